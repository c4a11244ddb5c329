"""Which documents of a source are those of part 3 of 8?

Whole files where there are enough of them, so that nothing is read twice: files 3, 11, 19, ... Otherwise, and for a
source without files, every part reads all of it and keeps the documents number 3, 11, 19, ..., counted from 0. Each
document is then in exactly one part, and so is each bad record, whoever reads and however often.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import TypeVar

from nanollm.sources.files import BadRecord, OnBad

File = TypeVar("File")
Document = TypeVar("Document")


def share(
    read: Callable[[Sequence[File] | None, OnBad], Iterable[Document]],
    files: Sequence[File] | None,
    part: int,
    parts: int,
) -> Callable[[OnBad], Iterable[Document]]:
    """How to read the part's share of what `read(files, on_bad)` gives; files None: it has none."""
    assert 0 <= part < parts
    if files is not None and len(files) >= parts:
        return partial(read, files[part::parts])
    return partial(_every_nth, partial(read, files), part, parts)


def _every_nth(read: Callable[[OnBad], Iterable[Document]], first: int, step: int, on_bad: OnBad) -> Iterator[Document]:
    numbers = count()

    def pick(record: BadRecord) -> None:
        if next(numbers) % step == first:
            on_bad(record)

    return islice(read(pick), first, None, step)
