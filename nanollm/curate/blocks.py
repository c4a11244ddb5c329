"""Blocks of datatrove that read our sources, write our shards, and list what is removed on the way.

datatrove (https://github.com/huggingface/datatrove) runs a list of blocks in N tasks; each task sees its own share. A
block is a function of documents, rank and number of tasks. Tasks leave behind files named by their rank, the same ones
however often a task is killed and run again.
"""

import gzip
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from datatrove.data import Document

from nanollm import durable, progress
from nanollm.data.merge import part_folder, part_source
from nanollm.data.prepare import PrepareConfig, SourceSplit, prepare
from nanollm.sources.files import BadRecord, File, OnBad, read_texts
from nanollm.sources.split import share
from nanollm.text.tokenizer import Tokenizer

Documents = Iterator[Document]


class Lists:
    """One list of records per task, <rank>.jsonl.gz, and when it is whole the count of each reason, <rank>.json.

    datatrove's filters write what they remove into it: write(document, rank) between enter and exit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rank: int | None = None  # from the first record on, because only then is it known

    def write(self, document: Document, rank: int) -> None:
        reason = document.metadata.get("filter_reason", self.folder.name)
        facts = {key: value for key, value in document.metadata.items() if key != "filter_reason"}
        self.add({"id": document.id, "reason": reason} | facts | {"text": document.text}, rank, reason)

    def add(self, record: Mapping[str, Any], rank: int, reason: str = "") -> None:
        if self._rank is None:
            self._rank, self._counts = rank, Counter[str]()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._raw: BinaryIO = (self.folder / f"{rank:05d}.jsonl.gz").open("wb")
            # Without name and time, so that equal lists are equal files.
            self._file = gzip.GzipFile("", "wb", compresslevel=1, fileobj=self._raw, mtime=0)
        self._counts[reason] += 1
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._rank is not None:
            self._file.close()
            self._raw.close()
            if kind is None:
                durable.write_json(self.folder / f"{self._rank:05d}.json", dict(sorted(self._counts.items())))
            self._rank = None


def read_list(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a list; none if there is no such file."""
    if file.exists():
        with gzip.open(file) as lines:
            yield from map(json.loads, lines)


def count_lists(folder: Path) -> Counter[str]:
    """How many records all lists of a folder hold, by reason."""
    total: Counter[str] = Counter()
    for file in sorted(folder.glob("*.json")):
        total.update(json.loads(file.read_bytes()))
    return total


def read_share(
    _: None, rank: int, tasks: int, *, files: Sequence[File], column: str, bad_folder: Path
) -> Iterator[Document]:
    """The task's share of the documents of files, here or elsewhere; bad records are listed."""

    def read(files: Sequence[File] | None, on_bad: OnBad) -> Iterator[tuple[str, str]]:
        for file in files or []:
            for number, text in enumerate(read_texts([file], column, on_bad), start=1):
                yield f"{file}, document {number:,}", text

    bad: list[BadRecord] = []
    for where, text in share(read, files, rank, tasks)(bad.append):
        yield Document(text=text, id=where)
    bad_folder.mkdir(parents=True, exist_ok=True)
    durable.write_json(bad_folder / f"{rank:05d}.json", [asdict(record) for record in bad])


def keep(documents: Documents, rank: int, tasks: int, *, folder: Path) -> Documents:
    """Write down what comes by, for a later pipeline of as many tasks, and pass it on."""
    with Lists(folder) as lists:
        for document in documents:
            lists.add({"id": document.id, "text": document.text}, rank)
            yield document


def read_kept(_: None, rank: int, tasks: int, *, folder: Path) -> Documents:
    """What the task of the same number kept, in the same order."""
    return (Document(**record) for record in read_list(folder / f"{rank:05d}.jsonl.gz"))


def name_clusters(documents: Documents, rank: int, tasks: int, *, remove: Path, folder: Path) -> Documents:
    """List which documents are duplicates of one another, before datatrove's last MinHash block drops all but one.

    remove: what MinhashDedupCluster wrote, with cluster ids.
    """
    clusters = dict(_numbers(remove / f"{rank:06d}.clusters", "<II"))
    removed = {number for (number,) in _numbers(remove / f"{rank:06d}.remove", "<I")}
    with Lists(folder) as lists:
        for number, document in enumerate(documents):
            if number in clusters:
                document.metadata["cluster"] = clusters[number]
                is_kept = number not in removed
                lists.add({"cluster": clusters[number], "id": document.id, "is_kept": is_kept}, rank)
            yield document


def _numbers(file: Path, form: str) -> list[Any]:
    return list(struct.iter_unpack(form, file.read_bytes())) if file.exists() else []


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
        for record in json.loads((bad_folder / f"{rank:05d}.json").read_bytes()):
            on_bad(BadRecord(**record))
        for document in documents:
            yield document.text

    folder, source = part_folder(save_dir, rank, tasks), part_source(source, rank, tasks)
    progress.set_quiet(True)  # many tasks, one terminal
    try:
        prepare([SourceSplit(read)], tokenizer, folder, config, source=source, may_be_empty=True)
    finally:
        progress.set_quiet(False)
