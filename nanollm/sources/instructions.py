"""Super-NaturalInstructions: a task and its input as the prompt, the expected output as the response.

Two million examples (columns `prompt`, `response`); everything is in the split "train".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanollm.sources.files import OnBad, find_files, read_rows
from nanollm.sources.hub import stream_rows
from nanollm.text.chat import Conversation

NAME = "andersonbcdefg/supernatural-instructions-2m"
COLUMNS = ("prompt", "response")


def conversations(inputs: Sequence[Path] | None, split: str, on_bad: OnBad, name: str = NAME) -> Iterator[Conversation]:
    """One turn each: all that is in the files or folders, or a split of the hub's dataset."""
    if inputs is None:
        rows = stream_rows(name, split, COLUMNS, on_bad)
    else:
        rows = read_rows(find_files(inputs), COLUMNS, on_bad)
    for prompt, response in rows:
        yield Conversation.of(prompt, response)
