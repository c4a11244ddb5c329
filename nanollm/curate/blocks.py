"""Blocks of datatrove that read our sources, write our shards, and list what is removed on the way.

datatrove (https://github.com/huggingface/datatrove) runs a list of blocks in N tasks; each task sees its own share. A
block is a function of documents, rank and number of tasks. Tasks leave behind files named by their rank, the same ones
however often a task is killed and run again.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from datatrove.data import Document

from nanollm import durable, progress
from nanollm.data.prepare import PrepareConfig, SourceSplit, prepare
from nanollm.sources.files import BadRecord, File, OnBad, read_texts
from nanollm.text.tokenizer import Tokenizer

Documents = Iterator[Document]


class RemovedWriter:
    """Lists the documents that a filter of datatrove drops, one file per task: <rank>.jsonl.gz."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None  # opened late, because the rank is only known in the task

    def write(self, document: Document, rank: int) -> None:
        if self._file is None:
            self._file = _open_list(self.folder, rank, "wt")
        record = {"id": document.id} | document.metadata | {"text": document.text}
        self._file.write(json.dumps(record) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_list(folder: Path, rank: int, mode: str) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return gzip.open(folder / f"{rank:05d}.jsonl.gz", mode, compresslevel=1)


def read_share(
    _: None, rank: int, tasks: int, *, files: Sequence[File], column: str, bad_folder: Path
) -> Iterator[Document]:
    """The task's share of the documents of files, here or elsewhere; bad records are listed, by one task each.

    Whole files where there are at least as many as tasks. Otherwise every task reads all and takes each tasks-th.
    """
    has_files_of_its_own = len(files) >= tasks
    bad: list[BadRecord] = []
    number = 0  # of all documents that this task reads
    for file in files[rank::tasks] if has_files_of_its_own else files:
        for place, text in enumerate(read_texts([file], column, bad.append), start=1):
            if has_files_of_its_own or number % tasks == rank:
                yield Document(text=text, id=f"{file}, document {place:,}")
            number += 1
    bad_folder.mkdir(parents=True, exist_ok=True)
    is_mine = has_files_of_its_own or rank == 0
    durable.write_json(bad_folder / f"{rank:05d}.json", [asdict(record) for record in bad] if is_mine else [])


def read_bad(file: Path) -> list[BadRecord]:
    """What read_share has listed."""
    return [BadRecord(**record) for record in json.loads(file.read_bytes())]


def keep(documents: Documents, rank: int, tasks: int, *, folder: Path) -> Documents:
    """Write down what comes by, for a later pipeline of as many tasks, and pass it on."""
    with _open_list(folder, rank, "wt") as file:
        for document in documents:
            file.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
            yield document


def read_kept(_: None, rank: int, tasks: int, *, folder: Path) -> Documents:
    """What the task of the same number kept, in the same order."""
    with _open_list(folder, rank, "rt") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def part_folder(save_dir: Path, rank: int) -> Path:
    """Where a task prepares its part of the token files."""
    return save_dir / f"part-{rank:05d}"


def write_shards(
    documents: Documents,
    rank: int,
    tasks: int,
    *,
    save_dir: Path,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    source: dict[str, Any],
    bad_folder: Path,
) -> None:
    """Make what arrives one part of a prepared folder (data/prepare.py), and go on where a kill left it."""

    def read(on_bad: OnBad) -> Iterator[str]:
        for record in read_bad(bad_folder / f"{rank:05d}.json"):
            on_bad(record)
        for document in documents:
            yield document.text

    source = {**source, "part": [rank, tasks]}
    progress.set_quiet(True)  # many tasks, one terminal
    try:
        prepare([SourceSplit(read)], tokenizer, part_folder(save_dir, rank), config, source=source, may_be_empty=True)
    finally:
        progress.set_quiet(False)
