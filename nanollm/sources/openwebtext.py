"""OpenWebText: what people linked to, as plain documents (column `text`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanollm.sources.files import OnBad, find_files, read_texts
from nanollm.sources.hub import stream_rows

NAME = "Skylion007/openwebtext"


def documents(inputs: Sequence[Path] | None, on_bad: OnBad, name: str = NAME) -> Iterator[str]:
    """Documents from files or folders, or from the hub where `inputs` is None."""
    if inputs is not None:
        yield from read_texts(find_files(inputs), "text", on_bad)
    else:
        for (text,) in stream_rows(name, "train", ["text"], on_bad):
            yield text
