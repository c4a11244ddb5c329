"""Writes files and folders atomically: after a crash a reader finds the old state or the new one, never half.

Write beside the target, fsync, rename, fsync the folder.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MAX_JSON_BYTES = 2**25
"""A file of others may be of any size, and takes more memory than that when it is read."""
SEAL, END = b',\n  "seal": "', b'"\n}\n'
SEALED = 64 + len(END)  # the last bytes of a sealed file: sha256 in hex, and the end


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; it orders renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, whose names outlive a power cut; nothing if it is there."""
    if path.is_dir() or path == path.parent:  # the latter: a drive that is not there
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file's content in one moment."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file in one moment; the same value gives the same bytes."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, advice: str = "copy it again") -> dict[str, Any]:
    """The object in a JSON file; ValueError for anything else. advice: what to do about that."""
    return _parse(path, _read(path, MAX_JSON_BYTES), advice)


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON object that holds its "format"; its last field, the seal, is the sha256 of all before it."""
    head = json.dumps(value, indent=2).encode().removesuffix(b"\n}") + SEAL
    write_file(path, head + hashlib.sha256(head).hexdigest().encode() + END)


def read_sealed_json(
    path: Path, form: object, advice: str = "copy it again", most_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The object without its seal; ValueError if a single byte is not as it was written.

    form: the "format" since which there is a seal. Neither another one alone nor a lost seal alone lets an object pass
    unchecked: it takes two changes to look like what an older version, or another program, wrote.
    """
    raw = _read(path, most_bytes)  # once: another process may replace the file
    value = _parse(path, raw, advice)
    if "seal" not in value and value.get("format") != form:
        return value
    head, seal, end = raw[:-SEALED], raw[-SEALED : -len(END)], raw[-len(END) :]
    if not head.endswith(SEAL) or end != END or hashlib.sha256(head).hexdigest().encode() != seal:
        raise ValueError(f"{path} was changed after it was written; {advice}")
    return {name: each for name, each in value.items() if name != "seal"}


def _read(path: Path, most_bytes: int) -> bytes:
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes, expected at most {most_bytes:,}; this is another file than it says"
        )
    return path.read_bytes()


def _parse(path: Path, raw: bytes, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}; {advice}")
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it takes the place of `path`, and not before.

    A folder already at `path` is moved aside just before and deleted just after; killed in between, `recover` brings it
    back.
    """
    path = path.resolve()  # a link keeps its place, what it leads to is replaced
    make_folder(path.parent)
    recover(path)
    beside = path.with_name(path.name + ".tmp")
    beside.mkdir()
    try:
        yield beside
        put_in_place(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def put_in_place(draft: Path, path: Path) -> None:
    """Let a filled folder beside `path` take its place in one moment, once its files are on the disk."""
    for file in draft.iterdir():
        sync(file)
    sync(draft)
    if path.exists():
        path.rename(path.with_name(path.name + ".old"))
    draft.rename(path)
    sync(path.parent)
    recover(path)


def recover(path: Path) -> None:
    """Undo or finish what a killed `new_folder(path)` left: the folder is then the old one or the new one, alone."""
    path = path.resolve()
    beside, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (beside, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def check_replaceable(path: Path, written: Collection[str], *, force: bool, what: str) -> None:
    """Refuse a folder (--out) in whose place something else would be lost.

    written: the names of files that we wrote there before, none if it is not ours; what: what we call such a folder.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; choose another --out")
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    if foreign := [name for name in names if name not in written]:
        raise ValueError(f"{path} holds {foreign[0]}, which is not of {what}; choose another --out")
    if names and not force:
        raise ValueError(f"{path} is {what} already; choose another --out, or replace it with --force")


def check_writable(folder: Path, option: str) -> None:
    """Make the folder, and a file in it, before hours are spent on what it is for."""
    probe = folder / ".probe"
    try:
        make_folder(folder)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another {option}") from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the lock dies with this process.

    ValueError where another one holds it.
    """
    make_folder(folder)
    # Not the file's mere existence instead of a lock, where those are missing: it would outlive this process.
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        message = f"{folder} is in use by another process; wait for its end or choose another folder"
        raise ValueError(message) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        reason = f"this file system cannot lock files ({error.strerror})"
        raise OSError(error.errno, reason, str(folder / ".lock")) from error
    try:
        yield
    finally:
        lock.release()
