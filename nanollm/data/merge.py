"""Merging: the parts that several jobs prepared become one folder, whoever ends last and whoever is killed.

Each job fills `part-00003-of-00008/` inside the folder, by data/prepare.py. Whoever finds all of them finished takes
the folder's lock, moves their files up under consecutive numbers, writes bad_records.jsonl and then, in one moment, the
manifest; after that the empty parts go. Until the manifest is there the parts hold the plan (their own manifests), and
a file is either at its old place or at its new one: killed anywhere and started again, a merge ends the same.
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanollm import durable
from nanollm.data.prepare import BAD_RECORDS, read_progress, refuse_other
from nanollm.data.shards import (
    MANIFEST,
    PROGRESS,
    FileEntry,
    ShardEntry,
    SplitEntry,
    read_manifest,
    read_sealed_manifest,
    write_manifest,
)

MAX_PARTS = 99_999  # their folders have five digits
PART = re.compile(r"part-(\d{5})-of-(\d{5})")

Header = dict[str, Any]
Move = tuple[Path, Path, FileEntry]  # from, to, and what it must look like


def part_folder(folder: Path, part: int, parts: int) -> Path:
    """Where part number `part` of `parts`, counted from 0, is prepared."""
    return folder / f"part-{part:05d}-of-{parts:05d}"


def part_source(source: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The source of a part, as its own manifest describes it: that of the whole, and which part."""
    return {**source, "part": [part, parts]}


def is_merged(folder: Path) -> bool:
    """Whether the parts of a folder have become one, or it never had any and is prepared."""
    return (folder / MANIFEST).exists()


def refuse_parts(folder: Path) -> None:
    """Raise ValueError if a folder that one job is to fill holds the parts of several."""
    if parts := _part_folders(folder):
        raise ValueError(
            f"{folder} holds {parts[0].name}: it is prepared in parts; go on with --part and --parts, "
            f"or give another --save_dir"
        )


def begin_part(folder: Path, part: int, parts: int, header: Header) -> Path:
    """The folder of a part. Raises ValueError, before any work, if the parts beside it belong to another whole.

    `header` is prepare.header_of the whole, not of the part.
    """
    if (folder / PROGRESS).exists():
        raise ValueError(f"{folder} was begun without --parts; go on without them, or give another --save_dir")
    for other in _part_folders(folder):
        count = int(other.name.rpartition("-")[2])
        if count != parts:
            raise ValueError(
                f"{folder} holds {other.name}, so it is prepared in {count} parts, this command has --parts {parts}; "
                f"go on with --parts {count}, or give another --save_dir"
            )
        if before := _header_in(other):
            refuse_other(other, _whole(before), header)
    return part_folder(folder, part, parts)


def missing(folder: Path, parts: int) -> list[int]:
    """The numbers of the parts that are not prepared yet; none once they are merged."""
    unfinished = [part for part in range(parts) if not _is_finished(part_folder(folder, part, parts))]
    return [] if is_merged(folder) else unfinished  # asked last: another job may merge in between


def merge(folder: Path, parts: int, header: Header, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Make one prepared folder of its parts, none of which is missing, and return its manifest.

    header: prepare.header_of the whole; more: what the manifest shall hold beside it. Several may call this at once:
    all but one wait, and find it done.
    """
    with durable.lock_folder(folder, wait=True):
        if not is_merged(folder):
            _merge(folder, parts, header, more or {})
        _clear(folder)
    return read_manifest(folder)[0]


def finish_merge(folder: Path) -> None:
    """Remove the parts that a merge left which was killed at its very end."""
    if is_merged(folder) and _part_folders(folder):
        with durable.lock_folder(folder, wait=True):
            _clear(folder)


def _clear(folder: Path) -> None:
    for part in _part_folders(folder):
        shutil.rmtree(part)


def _merge(folder: Path, parts: int, header: Header, more: Mapping[str, Any]) -> None:
    folders = [part_folder(folder, part, parts) for part in range(parts)]
    manifests = [read_manifest(each)[0] for each in folders]
    for each, manifest in zip(folders, manifests, strict=True):
        refuse_other(each, _whole(manifest), header)
    splits, moves = _joined(folder, folders, manifests)
    bad_records = sum(manifest["bad_records"] for manifest in manifests)
    if not splits["train"]["tokens"]:
        documents = sum(split["documents"] for split in splits.values())
        raise ValueError(
            f"nothing to train on: {documents} documents of the source went to other splits, {bad_records} records "
            f"were bad; give more text, or a smaller --val_fraction, and another --save_dir"
        )
    for move in moves:
        _move(*move)
    if bad_records:
        durable.write_file(folder / BAD_RECORDS, b"".join(_read_all(each / BAD_RECORDS for each in folders)))
    durable.sync(folder)
    write_manifest(folder, header | {"parts": parts, "bad_records": bad_records, "splits": splits} | dict(more))


def _joined(
    folder: Path, folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, SplitEntry], list[Move]]:
    """The splits of all parts under consecutive numbers, and which file goes where."""
    splits: dict[str, SplitEntry] = {}
    moves: list[Move] = []
    for part, manifest in zip(folders, manifests, strict=True):
        for name, entry in manifest["splits"].items():
            whole = splits.setdefault(name, SplitEntry(tokens=0, documents=0, text_bytes=0, shards=[]))
            for total in ("tokens", "documents", "text_bytes"):
                whole[total] += entry[total]
            for shard in entry["shards"]:
                number = len(whole["shards"])
                new_names = {old: re.sub(r"\d{5}", f"{number:05d}", old, count=1) for old in shard["files"]}
                moves += [(part / old, folder / new, shard["files"][old]) for old, new in new_names.items()]
                files = {new: shard["files"][old] for old, new in new_names.items()}
                whole["shards"].append(ShardEntry(tokens=shard["tokens"], documents=shard["documents"], files=files))
    return splits, moves


def _move(old: Path, new: Path, entry: FileEntry) -> None:
    """Put a file in its new place, unless an earlier merge has."""
    if old.exists():
        old.replace(new)
    size = new.stat().st_size if new.exists() else 0
    if size != entry["size"]:
        raise ValueError(
            f"{new} has {size:,} bytes, {old.parent / MANIFEST} says {entry['size']:,}; "
            f"remove {new.parent} and prepare it again"
        )


def _read_all(paths: Iterable[Path]) -> Iterable[bytes]:
    return (path.read_bytes() for path in paths if path.exists())


def _part_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("part-*") if PART.fullmatch(path.name)) if folder.is_dir() else []


def _is_finished(part: Path) -> bool:
    # By listing, because network file systems remember for seconds that a single name was not there.
    names = {path.name for path in part.iterdir()} if part.is_dir() else set()
    return MANIFEST in names and PROGRESS not in names


def _header_in(part: Path) -> Header | None:
    """What a part was begun with; None if nothing of it is written yet."""
    with suppress(FileNotFoundError):  # it may end between two looks: then there is a manifest
        progress = read_progress(part)
        has_tokens = any(split["tokens"] for split in progress["splits"].values())
        return dict(progress["header"]) if has_tokens else None
    with suppress(FileNotFoundError):  # not read_manifest, to which one that begins just now is not finished
        return read_sealed_manifest(part)
    return None


def _whole(header: Header) -> Header:
    """A part's header as it is for the whole."""
    return {**header, "source": {key: value for key, value in header["source"].items() if key != "part"}}
