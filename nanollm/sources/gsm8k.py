"""GSM8K (arXiv:2110.14168): school problems, worked solutions, and which number is the answer.

A solution is kept exactly as written, with its calculator notes <<48/2=24>> and its last line "#### 24". The answer
is the text after the mark, exactly as well: "1,080" stays "1,080", and no sign, decimal or unit is lost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanollm.sources.files import OnBad, find_files, read_rows
from nanollm.sources.hub import stream_rows
from nanollm.text.chat import Conversation

NAME, CONFIG = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")
ANSWER_MARK = "####"


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the worked solution, ending in "#### 24"

    @property
    def conversation(self) -> Conversation:
        return Conversation.of(self.question, self.answer)


def problems(inputs: Sequence[Path] | None, split: str, on_bad: OnBad, name: str = NAME) -> Iterator[Problem]:
    """Problems of "train" or "test": from files, a folder's files with that word in their names, or the hub."""
    if inputs is None:
        rows = stream_rows(name, split, COLUMNS, on_bad, config_name=CONFIG)
    else:
        rows = read_rows(find_files(inputs, split), COLUMNS, on_bad)
    for question, answer in rows:
        yield Problem(question, answer)


def conversations(inputs: Sequence[Path] | None, split: str, on_bad: OnBad) -> Iterator[Conversation]:
    for each in problems(inputs, split, on_bad):
        yield each.conversation


def extract_answer(answer: str) -> str:
    """The text after the last "####", without the spaces around it: "1,080" of "... #### 1,080"."""
    _, mark, final = answer.rpartition(ANSWER_MARK)
    if not mark or not final.strip():
        raise ValueError(f"a GSM8K answer ends in '{ANSWER_MARK} <answer>', this one in {answer[-40:]!r}")
    return final.strip()
