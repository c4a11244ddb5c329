"""Text becomes shards, each document exactly once, however often the job is stopped.

One process reads the source, writes the files and notes in `progress.json` how far both are; others only encode. The
documents travel to them in chunks: large enough to hide the journey, small enough that a few per worker keep memory
flat. Killed and started again, the job cuts the files back to that note, reads past the documents before it, and goes
on: the finished folder has the same bytes as that of a job that was never stopped, for any number of workers.
"""

import json
import signal
import sys
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from nanollm import durable
from nanollm.data.shards import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PROGRESS,
    Flags,
    Ids,
    ShardWriter,
    open_at,
    read_manifest,
    write_manifest,
)
from nanollm.progress import Progress, say
from nanollm.sources.files import BadRecord, OnBad
from nanollm.sources.split import hash_to_unit
from nanollm.text.chat import Conversation, encode_conversation
from nanollm.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

BAD_RECORDS = "bad_records.jsonl"
CHUNK_BYTES = 1_000_000  # of text
CHUNKS_PER_WORKER = 3  # one at work, and two waiting while this process is busy

Document = str | Conversation


@dataclass(frozen=True)
class SourceSplit:
    """A stretch of the source; each call of `read` gives the same documents in the same order."""

    read: Callable[[OnBad], Iterable[Document]]
    split: str | None = None
    """The split that all of it goes to; None: train or val, drawn for each document by the hash of its text."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What decides the bytes of a prepared folder, besides its source and its tokenizer."""

    kind: Literal["text", "chat"]
    seed: int = 0
    val_fraction: float = 0.01
    max_tokens_train: int | None = None
    max_tokens_val: int | None = None
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        for name, least in (("max_tokens_train", 1), ("max_tokens_val", 0), ("shard_tokens", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def limit(self, split: str) -> int:
        """The most tokens that a split may have."""
        given = {"train": self.max_tokens_train, "val": self.max_tokens_val}.get(split)
        return sys.maxsize if given is None else given


@dataclass
class Chunk:
    """Documents that are encoded together."""

    documents: list[Document] = field(default_factory=list)
    bad: list[list[BadRecord]] = field(default_factory=list)
    """For each document, the bad records of the source between the one before and itself."""
    bad_after: list[BadRecord] = field(default_factory=list)
    """Bad records after the last document of the source."""
    checksum: int = 0
    """CRC-32 of everything that the source gave up to the last document of the chunk."""

    def append(self, document: Document, bad: Iterable[BadRecord]) -> None:
        self.documents.append(document)
        self.bad.append(list(bad))


@dataclass(frozen=True)
class EncodedChunk:
    """What a worker gives back: numbers in a few long vectors, which travel fast."""

    ids: Ids  # of all documents, one after the other
    flags: Flags | None  # 1 = trained; conversations only
    lengths: list[int]  # ids per document
    text_bytes: list[int]  # bytes of text per document
    is_val: list[bool]

    def documents(self) -> Iterator[tuple[Ids, Flags | None, int, bool]]:
        """Ids, flags, bytes of text and "is it for validation?" of each document."""
        start = 0
        for length, text_bytes, is_val in zip(self.lengths, self.text_bytes, self.is_val, strict=True):
            end = start + length
            yield self.ids[start:end], None if self.flags is None else self.flags[start:end], text_bytes, is_val
            start = end


Encode = Callable[[list[Document]], EncodedChunk]
Encoded = Iterator[tuple[Chunk, EncodedChunk]]


def prepare(
    parts: Sequence[SourceSplit],
    tokenizer: Tokenizer,
    folder: Path,
    rules: PrepareConfig,
    *,
    source: dict[str, Any],
    num_workers: int = 1,
    flush_every: int = 5_000_000,
    strict: bool = False,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """Fill `folder` with shards, or go on filling it, and return its manifest; one job at a time.

    `source` describes the parts in the manifest. A folder begun with another source, tokenizer or rules is refused.
    `strict` raises ValueError at the first bad record; otherwise they are listed in bad_records.jsonl. A folder without
    a token of train is refused unless it `may_be_empty`, as a share of a larger source may (data/merge.py).
    """
    header = header_of(tokenizer, rules, source)
    splits = dict.fromkeys(split for part in parts for split in ([part.split] if part.split else ["train", "val"]))
    encode = partial(encode_chunk, tokenizer=tokenizer, seed=rules.seed, val_fraction=rules.val_fraction)
    with durable.lock_folder(folder):
        progress = _find_progress(folder, header)
        if progress is None:
            return _already_prepared(folder, strict)
        with (
            encoder(encode, num_workers) as encode_in_order,
            _Job(folder, tokenizer, rules, list(splits), progress, strict=strict, may_be_empty=may_be_empty) as job,
            Progress("preprocess", rules.max_tokens_train, "tokens", done=job.train_tokens) as bar,
        ):
            while job.part < len(parts):
                part = parts[job.part]
                for chunk, encoded in encode_in_order(_chunks(part, job, min(CHUNK_BYTES, 4 * flush_every))):
                    is_full = not job.take(chunk, encoded, part.split, flush_every)
                    bar.advance(job.train_tokens - bar.done)
                    if is_full:
                        break
                job.end_part()
            return job.finish()


class _Job:
    """Writes what was encoded, in the order of the source, and knows how to go on after a kill."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        rules: PrepareConfig,
        splits: list[str],
        progress: dict[str, Any],
        *,
        strict: bool,
        may_be_empty: bool,
    ) -> None:
        self.folder, self.tokenizer, self.rules = folder, tokenizer, rules
        self.strict, self.may_be_empty = strict, may_be_empty
        self.header: dict[str, Any] = progress["header"]
        self.part: int = progress["part"]  # the one that is being read
        self.documents_read: int = progress["documents_read"]  # of that part
        self.checksum: int = progress["checksum"]  # of those documents
        self.bad_records: int = progress["bad_records"]
        self.full: list[str] = progress["full"]  # splits that take no more
        self.unsafe_tokens = 0  # written since the last sync
        write_progress(folder, progress)  # before any other file: from here on the folder is ours
        self.bad_file = open_at(folder / BAD_RECORDS, progress["bad_bytes"])
        self.writers = {
            split: ShardWriter(
                folder,
                split,
                shard_tokens=rules.shard_tokens,
                flags=rules.kind == "chat",
                resume=progress["splits"].get(split),
            )
            for split in splits
        }

    @property
    def train_tokens(self) -> int:
        return self.writers["train"].entry["tokens"]

    def take(self, chunk: Chunk, encoded: EncodedChunk, split: str | None, flush_every: int) -> bool:
        """Write a chunk; False when train is full, so that no more has to be read."""
        for place, (ids, flags, text_bytes, is_val) in enumerate(encoded.documents()):
            self._list_bad(chunk.bad[place])
            name = split or ("val" if is_val else "train")
            self._add(name, ids, flags, text_bytes)
            if name == "train" and name in self.full:
                return False
        self.documents_read += len(chunk.documents)
        self.checksum = chunk.checksum
        if self.unsafe_tokens >= flush_every:
            self.sync()
        # After the sync, because a job that goes on from it meets these again.
        self._list_bad(chunk.bad_after)
        return True

    def _add(self, split: str, ids: Ids, flags: Flags | None, text_bytes: int) -> None:
        if split in self.full:
            return
        writer = self.writers[split]
        room = self.rules.limit(split) - writer.entry["tokens"]
        if len(ids) > room:
            self.full.append(split)
            if room == 0 or self.rules.kind == "chat":
                return
            ids = ids[:room]
            text_bytes = int(self.tokenizer.token_bytes[ids].sum())
        writer.add(ids, flags, text_bytes=text_bytes)
        self.unsafe_tokens += len(ids)

    def _list_bad(self, records: Iterable[BadRecord]) -> None:
        for record in records:
            if self.strict:
                raise ValueError(f"{record}; repair it, or leave out --strict to list bad records and go on")
            self.bad_records += 1
            self.bad_file.write(json.dumps(asdict(record)).encode() + b"\n")

    def end_part(self) -> None:
        self.part, self.documents_read, self.checksum = self.part + 1, 0, 0
        self.sync()

    def sync(self) -> None:
        """Make all files safe on disk, and then the note that says how far they are."""
        self._sync_bad_file()
        progress = {
            "header": self.header,
            "part": self.part,
            "documents_read": self.documents_read,
            "checksum": self.checksum,
            "bad_records": self.bad_records,
            "bad_bytes": self.bad_file.tell(),
            "full": self.full,
            "splits": {split: writer.sync() for split, writer in self.writers.items()},
        }
        write_progress(self.folder, progress)
        self.unsafe_tokens = 0

    def _sync_bad_file(self) -> None:
        self.bad_file.flush()
        durable.sync(self.folder / BAD_RECORDS)

    def finish(self) -> dict[str, Any]:
        """Close all files, write the manifest and forget the progress."""
        if self.train_tokens == 0 and not self.may_be_empty:
            val = sum(writer.entry["documents"] for writer in self.writers.values())
            went = f"{val} documents of the source went to other splits" if val else "0 documents can be used"
            bad = f"{self.bad_records} records were bad (see {self.folder / BAD_RECORDS})"
            less = ", or a smaller --val_fraction" if val else ""
            raise ValueError(f"nothing to train on: {went}, {bad}; give more text{less}")
        self._sync_bad_file()
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        manifest = write_manifest(self.folder, self.header | {"bad_records": self.bad_records, "splits": splits})
        self.close()
        if self.bad_records == 0:
            (self.folder / BAD_RECORDS).unlink()
        (self.folder / PROGRESS).unlink()
        durable.sync(self.folder)
        return manifest

    def close(self) -> None:
        self.bad_file.close()
        for writer in self.writers.values():
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_of(tokenizer: Tokenizer, rules: PrepareConfig, source: dict[str, Any]) -> dict[str, Any]:
    """All that decides the bytes of a folder; the first part of its manifest."""
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"token files hold uint16: at most {MAX_VOCAB_SIZE:,} pieces, this tokenizer has {tokenizer.vocab_size:,}"
        )
    return {
        "kind": rules.kind,
        "dtype": "uint16",
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "source": source,
        "rules": asdict(rules),
    }


def _find_progress(folder: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """Where to begin; None if all is done. Raises ValueError if what is there does not belong to this job."""
    if (folder / PROGRESS).exists():
        progress = read_progress(folder)
        if any(split["tokens"] for split in progress["splits"].values()):
            refuse_other(folder, progress["header"], header)
            return progress
        return _begun(header)  # nothing is lost, so the settings may change
    if (folder / MANIFEST).exists():
        refuse_other(folder, read_manifest(folder)[0], header)
        return None
    if strangers := sorted([*folder.glob("*.npy"), *folder.glob(BAD_RECORDS)]):
        raise ValueError(f"{strangers[0]} is not part of a preparation; give an empty or a new folder as --save_dir")
    return _begun(header)


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    durable.write_sealed_json(folder / PROGRESS, {**progress, "format": FORMAT})


def read_progress(folder: Path) -> dict[str, Any]:
    """How far a folder is; FileNotFoundError if it is not begun, or finished."""
    return durable.read_sealed_json(
        folder / PROGRESS, FORMAT, "remove the folder and prepare it again", MAX_MANIFEST_BYTES
    )


def _begun(header: dict[str, Any]) -> dict[str, Any]:
    counts = dict.fromkeys(("part", "documents_read", "checksum", "bad_records", "bad_bytes"), 0)
    return {"header": header, **counts, "full": [], "splits": {}}


def refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Name the first thing in which two headers differ."""
    for key, new in now.items():
        old = before.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            name = next(name for name in [*new, *old] if old.get(name) != new.get(name))
            key, old, new = f"{key} {name}", old.get(name), new.get(name)
        if key == "tokenizer fingerprint":
            old, new = str(old)[:6], str(new)[:6]
        is_short = len(f"{old}{new}") <= 80
        differs = f"with {key} {old}, this command has {new}" if is_short else f"with another {key} than this command's"
        raise ValueError(
            f"{folder} was begun {differs}; give another --save_dir, or remove that folder to prepare it again"
        )


def _already_prepared(folder: Path, strict: bool) -> dict[str, Any]:
    manifest, _ = read_manifest(folder)
    if strict and manifest["bad_records"]:
        raise ValueError(f"{folder} was prepared without {manifest['bad_records']} bad records; see its {BAD_RECORDS}")
    say(f"{folder} is already prepared with these settings; nothing to do")
    return manifest


def _chunks(part: SourceSplit, job: _Job, chunk_bytes: int) -> Iterator[Chunk]:
    """The documents of a part that are not written yet, cut into chunks by their size."""
    skip, expected = job.documents_read, job.checksum
    number = size = checksum = 0
    chunk, bad = Chunk(), list[BadRecord]()
    for number, document in enumerate(part.read(bad.append), start=1):
        text = all_text(document)
        checksum = zlib.crc32(text, checksum)
        if number > skip:
            chunk.append(document, bad)
            size += len(text)
        elif number == skip:
            _refuse_changed(job.folder, checksum == expected)
            say(f"{job.folder}: {skip:,} documents are done, going on after them")
        bad.clear()
        if size >= chunk_bytes:
            chunk.checksum = checksum
            yield chunk
            chunk, size = Chunk(), 0
    _refuse_changed(job.folder, number >= skip)
    chunk.checksum, chunk.bad_after = checksum, bad
    yield chunk


def _refuse_changed(folder: Path, is_same: bool) -> None:
    if not is_same:
        raise ValueError(
            f"the source no longer begins with the documents that {folder} holds; "
            f"remove that folder to prepare it again, or bring the source back"
        )


# --- documents become ids, on several cores, and come back in their order ---


def encode_chunk(documents: list[Document], *, tokenizer: Tokenizer, seed: int, val_fraction: float) -> EncodedChunk:
    """Ids of documents, all of them text or all conversations, and for each the side of the split it falls on."""
    assert tokenizer.vocab_size <= MAX_VOCAB_SIZE
    tokenizer.remember_words()
    texts = [document for document in documents if isinstance(document, str)]
    conversations = [document for document in documents if not isinstance(document, str)]
    assert not texts or not conversations
    ids, flags, lengths = _spell_conversations(conversations, tokenizer) if conversations else _spell(texts, tokenizer)
    spoken = texts or ["".join(message.content for message in document.messages) for document in conversations]
    return EncodedChunk(
        ids=ids,
        flags=flags,
        lengths=lengths,
        text_bytes=[len(text.encode()) for text in spoken],
        is_val=[falls_into_val(document, seed, val_fraction) for document in documents],
    )


def _spell(texts: list[str], tokenizer: Tokenizer) -> tuple[Ids, None, list[int]]:
    """Each text between its marks, as Tokenizer.encode_document puts it: ids, no flags, ids per text."""
    inside, lengths = tokenizer.encode_all(texts)
    ends = np.cumsum(lengths + 2)
    ids = np.empty(inside.size + 2 * len(texts), dtype=np.uint16)
    is_inside = np.ones(ids.size, dtype=np.bool_)
    for places, mark in ((ends - lengths - 2, tokenizer.bos_id), (ends - 1, tokenizer.eos_id)):
        ids[places], is_inside[places] = mark, False
    ids[is_inside] = inside
    return ids, None, (lengths + 2).tolist()


def _spell_conversations(conversations: list[Conversation], tokenizer: Tokenizer) -> tuple[Ids, Flags, list[int]]:
    ids, flags, lengths = array("H"), bytearray(), list[int]()
    for conversation in conversations:
        encoded = encode_conversation(conversation, tokenizer)
        ids.fromlist(encoded.ids)
        flags += bytes(encoded.trained)
        lengths.append(len(encoded.ids))
    return np.array(ids, dtype=np.uint16), np.array(flags, dtype=np.uint8), lengths


def falls_into_val(document: Document, seed: int, val_fraction: float) -> bool:
    """Draw by the text itself, so that no document stands on both sides; of a conversation, by what is asked."""
    if isinstance(document, str):
        asked = document
    else:
        asked = "\0".join(message.content for message in document.messages if message.role != "assistant")
    return hash_to_unit(asked, f"split {seed}") < val_fraction


def all_text(document: Document) -> bytes:
    """Everything that a document says."""
    if isinstance(document, str):
        return document.encode()
    return "\0".join(f"{message.role}\0{message.content}" for message in document.messages).encode()


@contextmanager
def encoder(encode: Encode, num_workers: int) -> Iterator[Callable[[Iterable[Chunk]], Encoded]]:
    """A function that encodes a stream of chunks in order, in `num_workers` processes, of which this one is one."""
    others = num_workers - 1
    if others == 0:
        yield lambda chunks: ((chunk, encode(chunk.documents)) for chunk in chunks)
        return
    # Fresh processes: a fork would copy locks that the threads of this one (Arrow's, torch's) may hold.
    pool = ProcessPoolExecutor(others, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        for _ in range(others):
            pool.submit(int)  # a process starts at the first call: let them all start while the source is opened
        yield lambda chunks: _share(pool, others, encode, chunks)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; run the same command again, it goes on where it was "
            "(a smaller --num_workers needs less memory)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _share(pool: ProcessPoolExecutor, others: int, encode: Encode, chunks: Iterable[Chunk]) -> Encoded:
    """Keep the other processes supplied; while they are, encode here. Give everything back in order."""
    waiting: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    for chunk in chunks:
        if sum(not future.done() for _, future in waiting) < CHUNKS_PER_WORKER * others:
            future = pool.submit(_work, chunk.documents)
        else:
            future = Future()
            future.set_result(encode(chunk.documents))
        waiting.append((chunk, future))
        while waiting and (waiting[0][1].done() or len(waiting) > 4 * CHUNKS_PER_WORKER * others):
            chunk, future = waiting.popleft()
            yield chunk, future.result()
    for chunk, future in waiting:
        yield chunk, future.result()


_encode: Encode  # of a worker process, set once when it starts


def _start_worker(encode: Encode) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    signal.raise_signal(signal.SIGTERM)


def _work(documents: list[Document]) -> EncodedChunk:
    return _encode(documents)
