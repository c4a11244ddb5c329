"""Files of an object store or of the hub, found and opened like local ones.

An address has `://` in it: hf://datasets/OWNER/NAME/FOLDER, s3://BUCKET/FOLDER, gs://..., each a file, a folder that is
searched through, or a pattern with *. fsspec opens them, with the package that it names if that is missing. Anything
else is a path of this machine.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast

from nanollm.sources.datasets import one_line
from nanollm.sources.files import File, find_files, format_of, need


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere."""

    address: str
    size: int  # bytes

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    def open(self, mode: Literal["rb"]) -> io.BufferedReader:
        system, path = _system_of(self.address)
        # Buffered, because what fsspec opens reads lines byte by byte.
        return io.BufferedReader(cast(io.RawIOBase, system.open(path, mode)))

    def __str__(self) -> str:
        return self.address


def find_everywhere(inputs: Sequence[str]) -> list[File]:
    """The readable files among addresses and local files and folders, in order, each once."""
    found: dict[File, None] = {}
    for given in inputs:
        some: Sequence[File] = _find_remote(given) if "://" in given else find_files([Path(given).expanduser()])
        found.update(dict.fromkeys(some))
    return list(found)


def size_of(file: File) -> int:
    """In bytes."""
    return file.size if isinstance(file, RemoteFile) else Path(str(file)).stat().st_size


def _find_remote(address: str) -> list[RemoteFile]:
    system, path = _system_of(address)
    folder = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    try:
        entries: dict[str, dict[str, Any]] = system.find(folder, detail=True)
    except Exception as error:  # whatever the network or the store raises
        raise ValueError(f"cannot look into {address}: {one_line(error)}; check the address and the network") from error
    pattern = path if "*" in path else "*"
    files = [
        RemoteFile(system.unstrip_protocol(name), int(entry.get("size") or 0))
        for name, entry in sorted(entries.items())
        if entry["type"] == "file" and fnmatch(name, pattern)
    ]
    if not (readable := [file for file in files if format_of(file)]):
        raise FileNotFoundError(
            f"{address} holds no file to read (expected .txt, .jsonl, .csv or .parquet, also .gz or .zst), "
            f"or does not exist"
        )
    return readable


def _system_of(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path inside it."""
    fsspec = need("fsspec", f"to read {address}")
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {address}: {one_line(error)}") from error
    return system, path
