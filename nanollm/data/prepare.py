"""Text becomes shards, each document exactly once, however often the job is stopped.

One process reads the source, writes the files and notes in `progress.json` how far both are; others only encode. The
documents travel to them in chunks: large enough to hide the journey, small enough that a few per worker keep memory
flat. Killed and started again, the job cuts the files back to that note, reads past the documents before it, and goes
on: the finished folder has the same bytes as that of a job that was never stopped, for any number of workers.
"""

import json
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

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
from nanollm.text.chat import Conversation, Tool, encode_conversation
from nanollm.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

BAD_RECORDS = "bad_records.jsonl"
CHUNK_BYTES = 1_000_000  # of text
CHUNKS_PER_WORKER = 3  # one at work, and two waiting while the first process is busy

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


@dataclass(frozen=True)
class Chunk:
    """Documents that are encoded together, and the bad records that the source had on the way to the last of them."""

    documents: list[Document]
    bad: list[BadRecord]


@dataclass(frozen=True)
class EncodedChunk:
    """What a worker gives back: numbers in a few long vectors, which travel fast."""

    ids: Ids  # of all documents, one after the other
    flags: Flags | None  # 1 = trained; conversations only
    lengths: list[int]  # ids per document
    text_bytes: list[int]  # bytes of text per document
    is_val: list[bool]
    bad: list[BadRecord]

    def documents(self) -> Iterator[tuple[Ids, Flags | None, int, bool]]:
        """Ids, flags, bytes of text and "is it for validation?" of each document."""
        start = 0
        for length, text_bytes, is_val in zip(self.lengths, self.text_bytes, self.is_val, strict=True):
            end = start + length
            yield self.ids[start:end], None if self.flags is None else self.flags[start:end], text_bytes, is_val
            start = end


Encode = Callable[[Chunk], EncodedChunk]


def prepare(
    parts: Sequence[SourceSplit],
    tokenizer: Tokenizer,
    folder: Path,
    rules: PrepareConfig,
    *,
    source: dict[str, Any],
    tools: Sequence[Tool] = (),
    num_workers: int = 1,
    flush_every: int = 5_000_000,
    strict: bool = False,
    max_bad: float = 1.0,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """Fill `folder` with shards, or go on filling it, and return its manifest; one job at a time.

    What one of the `tools` would have written into a reply is not trained. `source` describes the parts in the
    manifest. A folder begun with another source, tokenizer or rules is refused.
    `strict` raises ValueError at the first bad record; otherwise they are listed in bad_records.jsonl, and above the
    share `max_bad` of all records they are a ValueError at the end, from which a larger one goes on. A folder without
    a token of train is refused unless it `may_be_empty`, as a share of a larger source may (curate/blocks.py).
    """
    header = header_of(tokenizer, rules, source)
    if tools:
        header["tools"] = [tool.__name__ for tool in tools]
    encode = partial(encode_chunk, tokenizer=tokenizer, seed=rules.seed, val_fraction=rules.val_fraction, tools=tools)
    with durable.lock_folder(folder):
        if (folder / MANIFEST).exists() and not (folder / PROGRESS).exists():
            manifest, _ = read_manifest(folder)
            refuse_other(folder, manifest, header)
            say(f"{folder} is already prepared with these settings; nothing to do")
            return manifest
        with (
            encoder(encode, num_workers) as encode_in_order,
            closing(_Job(folder, tokenizer, rules, parts, _find_progress(folder, header), strict)) as job,
            Progress("preprocess", rules.max_tokens_train, "tokens", done=job.tokens("train")) as bar,
        ):
            while (number := job.progress["part"]) < len(parts):
                for encoded in encode_in_order(_chunks(parts[number], job, min(CHUNK_BYTES, 4 * flush_every))):
                    job.take(encoded, parts[number].split)
                    bar.advance(job.tokens("train") - bar.done)
                    if parts[number].split in (None, "train") and job.is_full("train"):
                        break
                    if job.unsafe_tokens >= flush_every:
                        job.sync()
                job.progress |= {"part": number + 1, "documents_read": 0}
                job.sync()
            return job.finish(may_be_empty, max_bad)


class _Job:
    """Writes what was encoded, in the order of the source, and knows how to go on after a kill."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        rules: PrepareConfig,
        parts: Sequence[SourceSplit],
        progress: dict[str, Any],
        strict: bool,
    ) -> None:
        self.folder, self.tokenizer, self.rules, self.strict = folder, tokenizer, rules, strict
        self.progress = progress  # as it stands in progress.json, but for what was written since the last sync
        self.unsafe_tokens = 0  # written since then
        write_progress(folder, progress)  # before any other file: from here on the folder is ours
        self.bad_file = open_at(folder / BAD_RECORDS, progress["bad_bytes"])
        splits = dict.fromkeys(split for part in parts for split in ([part.split] if part.split else ["train", "val"]))
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

    def tokens(self, split: str) -> int:
        return self.writers[split].entry["tokens"]

    def is_full(self, split: str) -> bool:
        return split in self.progress["full"]

    def take(self, encoded: EncodedChunk, split: str | None) -> None:
        """Write a chunk, up to where train is full."""
        for record in encoded.bad:
            if self.strict:
                raise ValueError(f"{record}; repair it, or leave out --strict to list bad records and go on")
            self.bad_file.write(json.dumps(asdict(record)).encode() + b"\n")
        self.progress["bad_records"] += len(encoded.bad)
        for ids, flags, text_bytes, is_val in encoded.documents():
            name = split or ("val" if is_val else "train")
            self._add(name, ids, flags, text_bytes)
            if name == "train" and self.is_full(name):
                break
        self.progress["documents_read"] += len(encoded.lengths)

    def _add(self, split: str, ids: Ids, flags: Flags | None, text_bytes: int) -> None:
        if self.is_full(split):
            return
        limit = {"train": self.rules.max_tokens_train, "val": self.rules.max_tokens_val}.get(split)
        room = len(ids) if limit is None else limit - self.tokens(split)
        if len(ids) > room:
            self.progress["full"].append(split)
            if room == 0 or self.rules.kind == "chat":
                return
            ids = ids[:room]
            text_bytes = int(self.tokenizer.token_bytes[ids].sum())
        self.writers[split].add(ids, flags, text_bytes=text_bytes)
        self.unsafe_tokens += len(ids)

    def sync(self) -> None:
        """Make all files safe on disk, and then the note that says how far they are."""
        self.bad_file.flush()
        durable.sync(self.folder / BAD_RECORDS)
        splits = {split: writer.sync() for split, writer in self.writers.items()}
        self.progress |= {"bad_bytes": self.bad_file.tell(), "splits": splits}
        write_progress(self.folder, self.progress)
        self.unsafe_tokens = 0

    def finish(self, may_be_empty: bool, max_bad: float) -> dict[str, Any]:
        """Close all files, write the manifest and forget the progress."""
        bad_records = self.progress["bad_records"]
        documents = sum(writer.entry["documents"] for writer in self.writers.values())
        if bad_records > max_bad * (bad_records + documents):
            self.bad_file.flush()
            with (self.folder / BAD_RECORDS).open() as file:
                first = BadRecord(**json.loads(file.readline()))
            raise ValueError(
                f"{bad_records:,} of {bad_records + documents:,} records are bad, the first: {first}; "
                f"{self.folder / BAD_RECORDS} lists all. Repair them, or leave them out with --max_bad 1"
            )
        if self.tokens("train") == 0 and not may_be_empty:
            raise ValueError(
                f"nothing to train on: {documents} documents went to other splits, {bad_records} records were bad "
                f"(see {self.folder / BAD_RECORDS}); give more text" + ", or a smaller --val_fraction" * bool(documents)
            )
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        manifest = write_manifest(self.folder, self.progress["header"] | {"bad_records": bad_records, "splits": splits})
        self.close()
        if bad_records == 0:
            (self.folder / BAD_RECORDS).unlink()
        (self.folder / PROGRESS).unlink()
        durable.sync(self.folder)
        return manifest

    def close(self) -> None:
        """Let go of all files as they are."""
        self.bad_file.close()
        for writer in self.writers.values():
            writer.close()


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


def _find_progress(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Where to go on, or to begin. Raises ValueError if what is there does not belong to this job."""
    if (folder / PROGRESS).exists():
        advice = "remove the folder and prepare it again"
        progress = durable.read_sealed_json(folder / PROGRESS, FORMAT, advice, MAX_MANIFEST_BYTES)
        if any(split["tokens"] for split in progress["splits"].values()):
            refuse_other(folder, progress["header"], header)
            return progress
        # Otherwise nothing is lost, so the settings may change.
    elif strangers := sorted([*folder.glob("*.npy"), *folder.glob(BAD_RECORDS)]):
        raise ValueError(f"{strangers[0]} is not part of a preparation; give an empty or a new folder as --save_dir")
    counts = dict.fromkeys(("part", "documents_read", "bad_records", "bad_bytes"), 0)
    return {"header": header, **counts, "full": [], "splits": {}}


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    durable.write_sealed_json(folder / PROGRESS, {**progress, "format": FORMAT})


def refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless a folder's header is what it is now; it names the first thing that differs."""
    old: Any = {name: before.get(name) for name in now}
    new: Any = now
    names: list[str] = []
    while old != new and isinstance(old, dict) and isinstance(new, dict):
        names.append(next(name for name in [*new, *old] if old.get(name) != new.get(name)))
        old, new = old.get(names[-1]), new.get(names[-1])
    if old != new:
        raise ValueError(
            f"{folder} was begun with {' '.join(names)} {old!s:.80}, this command has {new!s:.80}; give another "
            f"--save_dir, or remove that folder to prepare it again"
        )


def _chunks(part: SourceSplit, job: _Job, chunk_bytes: int) -> Iterator[Chunk]:
    """The documents of a part that are not written yet, cut into chunks by their size."""
    skip = job.progress["documents_read"]
    documents, bad = list[Document](), list[BadRecord]()
    number = size = 0
    for number, document in enumerate(part.read(bad.append), start=1):
        if number <= skip:
            bad.clear()  # they are listed
            continue
        documents.append(document)
        size += len(document) if isinstance(document, str) else sum(len(each.content) for each in document.messages)
        if size >= chunk_bytes:
            yield Chunk(documents, bad.copy())
            documents, size = [], 0
            bad.clear()
    if number < skip:
        raise ValueError(
            f"the source no longer has the {skip:,} documents that {job.folder} holds; bring it back, or remove that "
            f"folder to prepare it again"
        )
    yield Chunk(documents, bad)


# --- documents become ids, on several cores, and come back in their order ---


def encode_chunk(
    chunk: Chunk, *, tokenizer: Tokenizer, seed: int, val_fraction: float, tools: Sequence[Tool] = ()
) -> EncodedChunk:
    """Ids of documents, all of them text or all conversations, and for each the side of the split it falls on."""
    tokenizer.remember_words()
    texts = [document for document in chunk.documents if isinstance(document, str)]
    conversations = [document for document in chunk.documents if not isinstance(document, str)]
    assert not texts or not conversations
    spelled = _spell_conversations(conversations, tokenizer, tools) if conversations else _spell(texts, tokenizer)
    ids, flags, lengths = spelled
    spoken = texts or ["".join(message.content for message in document.messages) for document in conversations]
    return EncodedChunk(
        ids=ids,
        flags=flags,
        lengths=lengths,
        text_bytes=[len(text.encode()) for text in spoken],
        is_val=[falls_into_val(document, seed, val_fraction) for document in chunk.documents],
        bad=chunk.bad,
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


def _spell_conversations(
    conversations: list[Conversation], tokenizer: Tokenizer, tools: Sequence[Tool]
) -> tuple[Ids, Flags, list[int]]:
    ids, flags, lengths = array("H"), bytearray(), list[int]()
    for conversation in conversations:
        encoded = encode_conversation(conversation, tokenizer, tools)
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


@contextmanager
def encoder(encode: Encode, num_workers: int) -> Iterator[Callable[[Iterable[Chunk]], Iterator[EncodedChunk]]]:
    """A function that encodes a stream of chunks in order: here, or from 2 on in so many processes beside this one."""
    if num_workers == 1:
        yield partial(map, encode)
        return
    # Fresh processes: a fork would copy locks that the threads of this one (Arrow's, torch's) may hold.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        yield partial(_encode_in_pool, pool, CHUNKS_PER_WORKER * num_workers)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; run the same command again, it goes on where it was "
            "(a smaller --num_workers needs less memory)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_pool(pool: ProcessPoolExecutor, ahead: int, chunks: Iterable[Chunk]) -> Iterator[EncodedChunk]:
    """Keep `ahead` chunks with the pool, and give them back in order."""
    # Several chunks per worker, so that none is idle while this process writes; not all, or the source would be held
    # in memory. They come back in order whichever worker is first: the files must not depend on the number of workers.
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


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


def _work(chunk: Chunk) -> EncodedChunk:
    return _encode(chunk)
