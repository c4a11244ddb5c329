"""How do documents come into datatrove's pipelines and out as our shards, and how is listed what they lose on the way?

datatrove (https://github.com/huggingface/datatrove) runs a list of blocks in N tasks, on one machine, by Slurm or by
Ray; each task sees its own share. Tasks leave behind files named by their number (rank), the same ones however often a
task is killed and run again.
"""

import gzip
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from nanollm import durable, progress
from nanollm.data.merge import part_folder, part_source
from nanollm.data.prepare import Part, Rules, prepare
from nanollm.sources.files import BadRecord, File, OnBad, read_texts
from nanollm.sources.share import share
from nanollm.text.tokenizer import Tokenizer

Documents = Iterator[Document]


@dataclass(frozen=True)
class Workplace:
    """Where the files of a curation lie."""

    folder: Path

    @property
    def kept(self) -> Path:
        """Texts that passed the filters; gone at the end."""
        return self.folder / "kept"

    @property
    def minhash(self) -> Path:
        """What tells duplicates; gone at the end."""
        return self.folder / "minhash"

    @property
    def bad(self) -> Path:
        """Bad records of the source; at the end in bad_records.jsonl."""
        return self.folder / "bad"

    @property
    def removed(self) -> Path:
        """A folder for each filter: what it removed, and why."""
        return self.folder / "removed"

    @property
    def clusters(self) -> Path:
        """Which documents are duplicates of which, task by task; at the end in clusters.jsonl."""
        return self.folder / "clusters"

    @property
    def questions(self) -> Path:
        """The questions that no document may hold."""
        return self.folder / "questions.json"

    @property
    def logs(self) -> Path:
        """datatrove's own: logs, statistics, and which tasks are completed."""
        return self.folder / "logs"


class Listing:
    """A list of one task, <rank>.jsonl.gz, and once it is whole how many stand in it for which reason, <rank>.json."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self._counts_file = folder / f"{rank:05d}.json"
        self._counts_file.unlink(missing_ok=True)
        self._raw = list_file(folder, rank).open("wb")
        # Without name and time, so that equal lists are equal files.
        self._file = gzip.GzipFile("", "wb", compresslevel=1, fileobj=self._raw, mtime=0)

    def add(self, record: Mapping[str, Any], reason: str = "") -> None:
        self.counts[reason] += 1
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def close(self, is_whole: bool) -> None:
        self._file.close()
        self._raw.close()
        if is_whole:
            durable.write_json(self._counts_file, dict(sorted(self.counts.items())))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(is_whole=kind is None)


def list_file(folder: Path, rank: int) -> Path:
    """The list of a task."""
    return folder / f"{rank:05d}.jsonl.gz"


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


class Removed:
    """A writer of what a filter removes, as datatrove calls it: write(document, rank) between enter and exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listing: Listing | None = None  # from the first document on, because only then is the rank known

    def write(self, document: Document, rank: int) -> None:
        self._listing = self._listing or Listing(self.folder, rank)
        reason = document.metadata.get("filter_reason", self.folder.name)
        facts = {key: value for key, value in document.metadata.items() if key != "filter_reason"}
        self._listing.add({"id": document.id, "reason": reason} | facts | {"text": document.text}, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._listing is not None:
            self._listing.close(is_whole=kind is None)
            self._listing = None


class ReadShare(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """The task's share of the documents of files, here or elsewhere; bad records are listed."""

    type, name = "read", "files"

    def __init__(self, files: Sequence[File], column: str, bad: Path) -> None:
        super().__init__()
        self.files, self.column, self.bad = files, column, bad

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        bad: list[BadRecord] = []
        for where, text in share(self._read, self.files, rank, world_size)(bad.append):
            yield Document(text=text, id=where)
        self.bad.mkdir(parents=True, exist_ok=True)
        durable.write_json(self.bad / f"{rank:05d}.json", [asdict(record) for record in bad])

    def _read(self, files: Sequence[File] | None, on_bad: OnBad) -> Iterator[tuple[str, str]]:
        for file in files or []:
            for number, text in enumerate(read_texts([file], self.column, on_bad), start=1):
                yield f"{file}, document {number:,}", text


class Keep(PipelineStep):  # type: ignore[misc]
    """Write down what comes by, for a later pipeline of as many tasks, and pass it on."""

    type, name = "write", "kept"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        with Listing(self.folder, rank) as listing:
            for document in data:
                listing.add({"id": document.id, "text": document.text})
                yield document


class ReadKept(PipelineStep):  # type: ignore[misc]
    """What the task of the same number kept, in the same order."""

    type, name = "read", "kept"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        for record in read_list(list_file(self.folder, rank)):
            yield Document(**record)


class NameClusters(PipelineStep):  # type: ignore[misc]
    """Note which documents are duplicates of one another, before datatrove's last MinHash block drops all but one."""

    type, name = "dedup", "clusters"

    def __init__(self, remove: Path, clusters: Path) -> None:
        """remove: what MinhashDedupCluster wrote, with cluster ids; clusters: where to list."""
        super().__init__()
        self.remove, self.clusters = remove, clusters

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        clusters = dict(_numbers(self.remove / f"{rank:06d}.clusters", "<II"))
        removed = {number for (number,) in _numbers(self.remove / f"{rank:06d}.remove", "<I")}
        with Listing(self.clusters, rank) as listing:
            for number, document in enumerate(data):
                if number in clusters:
                    document.metadata["cluster"] = clusters[number]
                    is_kept = number not in removed
                    listing.add({"cluster": clusters[number], "id": document.id, "is_kept": is_kept})
                yield document


def _numbers(file: Path, form: str) -> list[Any]:
    return list(struct.iter_unpack(form, file.read_bytes())) if file.exists() else []


class WriteShards(PipelineStep):  # type: ignore[misc]
    """What arrives becomes one part of a prepared folder: data/prepare.py does it, and goes on where a kill left it."""

    type, name = "write", "shards"

    def __init__(self, save_dir: Path, tokenizer: Tokenizer, rules: Rules, source: dict[str, Any], bad: Path) -> None:
        """bad: where ReadShare listed the bad records of the same task."""
        super().__init__()
        self.save_dir, self.tokenizer, self.rules, self.source, self.bad = save_dir, tokenizer, rules, source, bad

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        def read(on_bad: OnBad) -> Iterator[str]:
            for record in json.loads((self.bad / f"{rank:05d}.json").read_bytes()):
                on_bad(BadRecord(**record))
            for document in data:
                yield document.text

        folder = part_folder(self.save_dir, rank, world_size)
        source = part_source(self.source, rank, world_size)
        progress.set_quiet(True)  # many tasks, one terminal
        try:
            prepare([Part(read)], self.tokenizer, folder, self.rules, source=source, may_be_empty=True)
        finally:
            progress.set_quiet(False)
