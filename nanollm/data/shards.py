"""Shards: token ids on disk that any program can read, checked against a manifest when they are opened.

A prepared folder holds one `manifest.json` and, for each split, numbered files that `np.load(..., mmap_mode="r")`
opens:

    train-00000.npy           uint16, the ids of whole documents one after the other
    train-00000.offsets.npy   int64, where each document starts in that file
    train-00000.flags.npy     uint8, conversations only: 1 where the model is trained to say this token

A document is never cut across two files. The manifest carries its own sha256. A folder that also holds `progress.json`
is not finished, and is refused. `verified.json` remembers which files were read to the last byte and found right: as
long as they are not written to, they are not read again at every start.
"""

import io
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from nanollm import durable
from nanollm.progress import say

FORMAT = "nanollm-shards-2"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**28  # it lists every file of the source
PROGRESS = "progress.json"
VERIFIED, VERIFIED_FORMAT = "verified.json", "nanollm-verified-1"
SETTLED_NS = 2 * 10**9
"""A file that was changed a shorter time ago may be changed again without a new time: clocks of file systems tick."""

Verification = Literal["size", "sha256"]
"""How closely files are held to their manifest: by their size, or by every byte."""

Stamp = list[int]
"""Of a file: see `_stamp`."""
Ids = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.uint8]

_HEADER_BYTES = 128


class FileEntry(TypedDict):
    """What a file must look like to be read."""

    size: int  # bytes
    sha256: str


class ShardEntry(TypedDict):
    """One finished shard: its token file, its offsets and, for conversations, its flags."""

    tokens: int
    documents: int
    files: dict[str, FileEntry]


class SplitEntry(TypedDict):
    """All of a split: finished shards, and totals that count the open one too."""

    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the text behind the tokens
    shards: list[ShardEntry]


class Column:
    """One growing .npy file: room for the header first, then numbers, and the true header when it is finished."""

    def __init__(self, path: Path, dtype: str, count: int = 0) -> None:
        """Start the file, or cut what is there back to its first `count` numbers and go on behind them."""
        self.path, self.dtype, self.count = path, np.dtype(dtype), count
        self._file = open_at(path, _HEADER_BYTES + count * self.dtype.itemsize if count else 0)
        if count == 0:
            self._file.write(_header(self.dtype, 0))

    def append(self, raw: bytes, count: int) -> None:
        self._file.write(raw)
        self.count += count

    def sync(self) -> None:
        self._file.flush()
        durable.sync(self.path)

    def close(self) -> None:
        self._file.close()

    def finish(self) -> FileEntry:
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.count))
        self.sync()
        self.close()
        return FileEntry(size=self.path.stat().st_size, sha256=durable.sha256_of(self.path))


class ShardWriter:
    """Documents of one split into numbered shards; a shard closes after the document that reaches `shard_tokens`.

    `sync` makes everything so far safe on disk and returns the entry from which a later writer continues.
    """

    def __init__(
        self, folder: Path, split: str, *, shard_tokens: int, flags: bool, resume: SplitEntry | None = None
    ) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.entry = resume or SplitEntry(tokens=0, documents=0, text_bytes=0, shards=[])
        self._dtypes = {"tokens": "<u2", "offsets": "<i8"} | ({"flags": "|u1"} if flags else {})
        self._open: dict[str, Column] = {}
        open_tokens = self.entry["tokens"] - sum(shard["tokens"] for shard in self.entry["shards"])
        open_documents = self.entry["documents"] - sum(shard["documents"] for shard in self.entry["shards"])
        finished = {name for shard in self.entry["shards"] for name in shard["files"]}
        current = {path.name for path in self._paths().values()} if open_documents else set()
        for path in folder.glob(f"{split}-[0-9]*.npy"):  # written after the last sync: they will be written again
            if path.name not in finished | current:
                path.unlink()
        if open_documents:
            self._start_shard(open_tokens, open_documents)

    def add(self, ids: Ids, flags: Flags | None = None, *, text_bytes: int) -> None:
        """One document: ids (n,) uint16, flags (n,) uint8 for conversations, and the bytes of text they stand for."""
        assert ids.dtype == np.uint16 and (flags is not None) == ("flags" in self._dtypes)
        if not self._open:
            self._start_shard(0, 0)
        tokens = self._open["tokens"]
        self._open["offsets"].append(tokens.count.to_bytes(8, "little"), 1)
        tokens.append(ids.tobytes(), len(ids))
        if flags is not None:
            assert flags.dtype == np.uint8 and len(flags) == len(ids)
            self._open["flags"].append(flags.tobytes(), len(flags))
        self.entry["tokens"] += len(ids)
        self.entry["documents"] += 1
        self.entry["text_bytes"] += text_bytes
        if tokens.count >= self.shard_tokens:
            self._finish_shard()

    def sync(self) -> SplitEntry:
        for column in self._open.values():
            column.sync()
        return self.entry

    def finish(self) -> SplitEntry:
        if self._open:
            self._finish_shard()
        return self.entry

    def close(self) -> None:
        """Let go of the files as they are, for a job that ends early."""
        for column in self._open.values():
            column.close()

    def _paths(self) -> dict[str, Path]:
        stem = f"{self.split}-{len(self.entry['shards']):05d}"
        return {
            name: self.folder / (f"{stem}.npy" if name == "tokens" else f"{stem}.{name}.npy") for name in self._dtypes
        }

    def _start_shard(self, tokens: int, documents: int) -> None:
        counts = {"tokens": tokens, "flags": tokens, "offsets": documents}
        self._open = {name: Column(path, self._dtypes[name], counts[name]) for name, path in self._paths().items()}

    def _finish_shard(self) -> None:
        tokens, documents = self._open["tokens"].count, self._open["offsets"].count
        files = {column.path.name: column.finish() for column in self._open.values()}
        self._open = {}
        self.entry["shards"].append(ShardEntry(tokens=tokens, documents=documents, files=files))


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to write behind its first `size` bytes; what stood there is gone."""
    if size and path.stat().st_size < size:
        raise ValueError(f"{path} is shorter than {PROGRESS} beside it says; remove the folder and start again")
    file = path.open("r+b" if size else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    """The .npy header of a vector; NumPy pads it, so that its length is the same for every count."""
    header = io.BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, form)
    assert header.tell() == _HEADER_BYTES
    return header.getvalue()


class Shards:
    """One split of a prepared folder, memory-mapped: it reads as one long vector of ids."""

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: dict[str, Any],
        fingerprint: str,
        verify: Verification,
        known: Mapping[str, Stamp],
    ):
        """Map the files and check them, by their size if they are known; KeyError or TypeError for a manifest that is
        none."""
        entry: SplitEntry = manifest["splits"][split]
        self.folder, self.split, self.fingerprint = folder, split, fingerprint
        self.kind: str = manifest["kind"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.text_bytes: int = entry["text_bytes"]
        self.has_flags = self.kind == "chat"
        self._tokens: list[Ids] = []
        self._offsets: list[npt.NDArray[np.int64]] = []
        self._flags: list[Flags] = []
        self.verified: dict[str, Stamp] = {}  # files that were read to the last byte
        for number, shard in enumerate(entry["shards"]):
            # The names are ours, not the manifest's, which may be another's and name files elsewhere.
            file = folder / f"{split}-{number:05d}.npy"
            paths = [file.with_suffix(end) for end in (".npy", ".offsets.npy", ".flags.npy")[: 2 + self.has_flags]]
            stamps = {path.name: _stamp(path) for path in paths}  # before they are read
            how = "size" if stamps.items() <= known.items() else verify
            form = ("<u2", shard["tokens"]), ("<i8", shard["documents"]), ("|u1", shard["tokens"])
            tokens, offsets, *flags = (_map(path, *each, shard, how) for path, each in zip(paths, form, strict=False))
            self._tokens.append(tokens)
            self._offsets.append(offsets)
            self._flags += flags
            if how == "size":
                continue
            if (largest := int(tokens.max())) >= self.vocab_size:
                raise ValueError(
                    f"{file} holds the id {largest}, its tokenizer has {self.vocab_size:,} pieces; prepare the folder "
                    f"again"
                )
            if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] >= len(tokens):
                raise ValueError(f"{file.with_suffix('.offsets.npy')} holds wrong places; prepare the folder again")
            self.verified |= stamps
        self._starts = [0, *np.cumsum([*map(len, self._tokens)]).tolist()]
        self.tokens_total, self.documents = self._starts[-1], sum(map(len, self._offsets))

    @classmethod
    def open(
        cls,
        folder: Path,
        split: str = "train",
        *,
        tokenizer_fingerprint: str | None,
        verify: Verification = "sha256",
    ) -> "Shards":
        """Check the folder against its manifest and this run's tokenizer (None: whichever it was), and map it.

        verify: sha256 reads every byte that was changed since it was last read; "size" is for processes beside one that
        does.
        """
        manifest, fingerprint = read_manifest(folder)
        try:
            if split not in manifest["splits"]:
                raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
            if not manifest["splits"][split]["tokens"]:
                raise ValueError(
                    f"the split {split!r} of {folder} is empty; prepare more text, or a larger share for it "
                    f"(nanollm preprocess --val_fraction)"
                )
            written = manifest["tokenizer"]["fingerprint"]
            if tokenizer_fingerprint not in (None, written):
                raise ValueError(
                    f"{folder} was written with tokenizer {written:.6}, this run uses {tokenizer_fingerprint:.6}. "
                    f"Prepare it again (nanollm preprocess ... --save_dir NEW_FOLDER) or point --tokenizer_path at the "
                    f"old one."
                )
            known = _read_verified(folder, fingerprint)
            shards = cls(folder, split, manifest, fingerprint, verify, known)
            _write_verified(folder, fingerprint, known, shards.verified)
            return shards
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / MANIFEST} is no manifest of ours ({error}); prepare the folder again"
            ) from error

    def read(self, start: int, length: int) -> Ids:
        """Tokens [start, start + length) of the split, across shard borders; (length,) uint16, not to be written to."""
        return self._span(self._tokens, start, length)

    def flags_read(self, start: int, length: int) -> Flags:
        """The same stretch of a chat split: 1 where the token is trained; (length,) uint8."""
        if not self.has_flags:
            raise ValueError(f"{self.folder} holds plain text: every token is trained, there are no flags to read")
        return self._span(self._flags, start, length)

    def document_offsets(self) -> npt.NDArray[np.int64]:
        """Where each document starts in the split: (documents,) int64, the first is 0."""
        return np.concatenate([np.asarray(o) + s for o, s in zip(self._offsets, self._starts[:-1], strict=True)])

    def _span(self, columns: Sequence[npt.NDArray[Any]], start: int, length: int) -> npt.NDArray[Any]:
        if not 0 <= start <= start + length <= self.tokens_total:
            raise IndexError(f"tokens {start} to {start + length} asked for, {self.folder} has {self.tokens_total}")
        shard = min(bisect_right(self._starts, start), len(columns)) - 1
        pieces = [columns[shard][start - self._starts[shard] :][:length]]
        while (missing := length - sum(map(len, pieces))) > 0:
            shard += 1
            pieces.append(columns[shard][:missing])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a finished folder and its fingerprint (sha256 of the file)."""
    if (folder / PROGRESS).exists():
        raise ValueError(f"{folder} is not finished: run the same nanollm preprocess command again, it continues")
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} is not a prepared folder (no {MANIFEST} in it); "
            f"make one: nanollm preprocess KIND --tokenizer_path TOKENIZER --save_dir {folder}"
        )
    manifest = durable.read_sealed_json(folder / MANIFEST, FORMAT, "prepare the folder again", MAX_MANIFEST_BYTES)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT!r}; "
            f"prepare the folder again"
        )
    return manifest, durable.sha256_of(folder / MANIFEST)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Finish a folder, and return what read_manifest will."""
    whole = {"format": FORMAT, **manifest}
    durable.write_sealed_json(folder / MANIFEST, whole)
    return whole


def _stamp(path: Path) -> Stamp:
    """What changes with a file: size, times and inode; nothing of a file that is not there."""
    if not path.is_file():
        return []
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_verified(folder: Path, fingerprint: str) -> dict[str, Stamp]:
    """The files that were found to be as this manifest says; none where the list itself is not as it was written."""
    try:
        found = durable.read_sealed_json(folder / VERIFIED, VERIFIED_FORMAT, most_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ValueError):
        return {}  # they are read once more
    is_ours = (found.get("format"), found.get("manifest")) == (VERIFIED_FORMAT, fingerprint)
    return found["files"] if is_ours else {}


def _write_verified(folder: Path, fingerprint: str, known: Mapping[str, Stamp], verified: Mapping[str, Stamp]) -> None:
    settled = {name: stamp for name, stamp in verified.items() if time.time_ns() - stamp[1] > SETTLED_NS}
    if not settled:
        return
    files = {**known, **settled}
    try:
        durable.write_sealed_json(
            folder / VERIFIED, {"format": VERIFIED_FORMAT, "manifest": fingerprint, "files": files}
        )
    except OSError as error:
        say(f"{folder} takes no {VERIFIED} ({error.strerror}): its files are read to the last byte at every start")


def _map(path: Path, dtype: str, length: int, shard: ShardEntry, verify: Verification) -> npt.NDArray[Any]:
    """Map a file of a shard: exactly so many numbers of this type, (length,)."""
    entry, again = shard["files"][path.name], "prepare the folder again (nanollm preprocess) or copy it again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the manifest beside it names it; {again}")
    if (size := path.stat().st_size) != entry["size"]:
        raise ValueError(f"{path} has {size:,} bytes, its manifest says {entry['size']:,}; {again}")
    if verify == "sha256" and (found := durable.sha256_of(path)) != entry["sha256"]:
        raise ValueError(f"{path} has sha256 {found[:6]}, its manifest says {entry['sha256']:.6}; {again}")
    try:
        column = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of what a header may say
        raise ValueError(f"{path} is not a .npy file ({error}); {again}") from error
    if (column.dtype, column.shape) != (np.dtype(dtype), (length,)):
        raise ValueError(f"{path} is not a .npy file of {length:,} {np.dtype(dtype)}; {again}")
    return column.view(np.ndarray)  # slices of the subclass np.memmap are ten times slower
