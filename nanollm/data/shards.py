"""Shards: token ids on disk that any program can read, checked against a manifest when they are opened.

A prepared folder holds one `manifest.json` and, for each split, numbered files that `np.load(..., mmap_mode="r")`
opens:

    train-00000.npy           uint16, the ids of whole documents one after the other
    train-00000.offsets.npy   int64, where each document starts in that file
    train-00000.flags.npy     uint8, conversations only: 1 where the model is trained to say this token

A document is never cut across two files. The manifest carries its own sha256. A folder that also holds `progress.json`
is not finished, and is refused.
"""

import io
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from nanollm import durable

FORMAT = "nanollm-shards-2"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**28  # it lists every file of the source
PROGRESS = "progress.json"

Verification = Literal["size", "sha256"]
"""How closely files are held to their manifest: by their size, or by every byte."""

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

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any], fingerprint: str) -> None:
        entry: SplitEntry = manifest["splits"][split]
        self.folder, self.split, self.fingerprint = folder, split, fingerprint
        self.kind: str = manifest["kind"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.tokens_total, self.documents, self.text_bytes = entry["tokens"], entry["documents"], entry["text_bytes"]
        self.has_flags = self.kind == "chat"
        stems = [f"{split}-{number:05d}" for number in range(len(entry["shards"]))]
        sizes = [shard["tokens"] for shard in entry["shards"]]
        documents = [shard["documents"] for shard in entry["shards"]]
        self._starts = [0, *np.cumsum(sizes).tolist()]
        self._tokens = _columns([folder / f"{stem}.npy" for stem in stems], "<u2", sizes)
        self._offsets = _columns([folder / f"{stem}.offsets.npy" for stem in stems], "<i8", documents)
        flag_files = [folder / f"{stem}.flags.npy" for stem in stems] if self.has_flags else []
        self._flags = _columns(flag_files, "|u1", sizes)

    @classmethod
    def open(
        cls,
        folder: Path,
        split: str = "train",
        *,
        tokenizer_fingerprint: str | None,
        verify: Verification = "sha256",
    ) -> "Shards":
        """Check the folder against its manifest and this run's tokenizer (None: whichever it was), then map it.

        verify: "size" is for processes beside one that reads every byte.
        """
        manifest, fingerprint = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        entry: SplitEntry = manifest["splits"][split]
        if entry["tokens"] == 0:
            raise ValueError(
                f"the split {split!r} of {folder} is empty; prepare more text, or a larger share for it "
                f"(nanollm preprocess --val_fraction)"
            )
        files = {name: file for shard in entry["shards"] for name, file in shard["files"].items()}
        written = manifest["tokenizer"]["fingerprint"]
        if tokenizer_fingerprint not in (None, written):
            raise ValueError(
                f"{folder / next(iter(files))} was written with tokenizer {written[:6]}, this run uses "
                f"{str(tokenizer_fingerprint)[:6]}. Prepare it again (nanollm preprocess ... --save_dir NEW_FOLDER) "
                f"or point --tokenizer_path at the old one."
            )
        for name, file in files.items():
            _check_file(folder / name, file, verify)
        shards = cls(folder, split, manifest, fingerprint)
        if verify == "sha256":
            shards._check_numbers()
        return shards

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

    def _check_numbers(self) -> None:
        """Raise for ids that the tokenizer lacks, and for documents that do not begin one after the other."""
        for number, (tokens, offsets) in enumerate(zip(self._tokens, self._offsets, strict=True)):
            file = self.folder / f"{self.split}-{number:05d}.npy"
            if (largest := int(tokens.max())) >= self.vocab_size:
                raise ValueError(
                    f"{file} holds the id {largest}, its tokenizer has {self.vocab_size:,} pieces; prepare the folder "
                    f"again"
                )
            if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] >= len(tokens):
                raise ValueError(f"{file.with_suffix('.offsets.npy')} holds wrong places; prepare the folder again")

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
    manifest = read_sealed_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT!r}; "
            f"prepare the folder again"
        )
    try:
        _check_entries(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST} is no manifest of ours ({error}); prepare the folder again") from error
    return manifest, durable.sha256_of(folder / MANIFEST)


def read_sealed_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it was written, whatever it says and whether the folder is finished."""
    return durable.read_sealed_json(folder / MANIFEST, FORMAT, "prepare the folder again", MAX_MANIFEST_BYTES)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Finish a folder, and return what read_manifest will."""
    whole = {"format": FORMAT, **manifest}
    durable.write_sealed_json(folder / MANIFEST, whole)
    return whole


def _check_entries(manifest: Mapping[str, Any]) -> None:
    """Raise for anything that is not as a writer leaves it: the folder may be another's, and name files elsewhere."""
    kind, tokenizer = manifest["kind"], manifest["tokenizer"]
    if type(tokenizer["vocab_size"]) is not int or type(tokenizer["fingerprint"]) is not str:
        raise TypeError("tokenizer")
    for split, entry in manifest["splits"].items():
        if not re.fullmatch(r"\w+", split):
            raise ValueError(f"split {split[:100]}")
        for number, shard in enumerate(entry["shards"]):
            expected = _file_sizes(f"{split}-{number:05d}", shard, has_flags=kind == "chat")
            found = {name: file["size"] for name, file in shard["files"].items() if type(file["sha256"]) is str}
            if wrong := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
                raise ValueError(f"shard {number} of {split}: {wrong[0][:100]}")
        totals = {"tokens": entry["tokens"], "documents": entry["documents"]}
        sums = {total: sum(shard[total] for shard in entry["shards"]) for total in totals}
        if totals != sums or type(entry["text_bytes"]) is not int:
            raise ValueError(f"totals of {split}")


def _file_sizes(stem: str, shard: ShardEntry, *, has_flags: bool) -> dict[str, int]:
    """The files of a shard, and how many bytes they have."""
    tokens, documents = shard["tokens"], shard["documents"]
    if (type(tokens), type(documents)) != (int, int):
        raise TypeError("tokens and documents")
    sizes = {f"{stem}.npy": 2 * tokens, f"{stem}.offsets.npy": 8 * documents}
    if has_flags:
        sizes[f"{stem}.flags.npy"] = tokens
    return {name: _HEADER_BYTES + size for name, size in sizes.items()}


def _check_file(path: Path, entry: FileEntry, verify: Verification) -> None:
    again = "prepare the folder again (nanollm preprocess) or copy it again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, the manifest beside it names it; {again}")
    if (size := path.stat().st_size) != entry["size"]:
        raise ValueError(f"{path} has {size:,} bytes, its manifest says {entry['size']:,}; {again}")
    if verify == "sha256" and (found := durable.sha256_of(path)) != entry["sha256"]:
        raise ValueError(f"{path} has sha256 {found[:6]}, its manifest says {entry['sha256'][:6]}; {again}")


def _parsed_header(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Shape, order and type of a .npy file; None where that is not ours to read."""
    try:
        np.lib.format.read_magic(head)
        found = np.lib.format.read_array_header_1_0(head)
    except (ValueError, TypeError, SyntaxError):
        return None
    return found if head.tell() == _HEADER_BYTES else None


def _columns(paths: Iterable[Path], dtype: str, lengths: Iterable[int]) -> list[npt.NDArray[Any]]:
    """Map files of exactly the numbers that they must hold."""
    columns = []
    for path, length in zip(paths, lengths, strict=False):
        with path.open("rb") as file:
            head = io.BytesIO(file.read(_HEADER_BYTES))  # no more of it is parsed, whatever length it claims
        if _parsed_header(head) != ((length,), False, np.dtype(dtype)):
            raise ValueError(f"{path} is not a .npy file of {length:,} {np.dtype(dtype)}; prepare the folder again")
        column = np.memmap(path, dtype, "r", offset=_HEADER_BYTES, shape=(length,))
        columns.append(column.view(np.ndarray))  # slices of the subclass np.memmap are ten times slower
    return columns
