"""How do documents become ids on several cores, and come back in their order?

The documents of a source travel in parcels: large enough to hide the journey to a worker and back, small enough that a
few per worker in flight keep memory flat and that all workers end at nearly the same time.
"""

import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process

import numpy as np

from nanollm.data.shards import Flags, Ids
from nanollm.sources.files import BadRecord
from nanollm.text.chat import Conversation, encode_conversation
from nanollm.text.draw import draw
from nanollm.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

PARCELS_PER_WORKER = 3  # one at work, and two waiting while this process is busy

Document = str | Conversation


@dataclass
class Parcel:
    """Documents that are encoded together."""

    documents: list[Document] = field(default_factory=list)
    bad: list[list[BadRecord]] = field(default_factory=list)
    """For each document, the bad records of the source between the one before and itself."""
    bad_after: list[BadRecord] = field(default_factory=list)
    """Bad records after the last document of the source."""
    checksum: int = 0
    """CRC-32 of everything that the source gave up to the last document of the parcel."""

    def append(self, document: Document, bad: Iterable[BadRecord]) -> None:
        self.documents.append(document)
        self.bad.append(list(bad))


@dataclass(frozen=True)
class EncodedParcel:
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


Encode = Callable[[list[Document]], EncodedParcel]
Encoded = Iterator[tuple[Parcel, EncodedParcel]]


def encode_parcel(documents: list[Document], *, tokenizer: Tokenizer, seed: int, val_fraction: float) -> EncodedParcel:
    """Ids of documents, all of them text or all conversations, and for each the side of the split it falls on."""
    assert tokenizer.vocab_size <= MAX_VOCAB_SIZE
    tokenizer.remember_words()
    texts = [document for document in documents if isinstance(document, str)]
    conversations = [document for document in documents if not isinstance(document, str)]
    assert not texts or not conversations
    ids, flags, lengths = _spell_conversations(conversations, tokenizer) if conversations else _spell(texts, tokenizer)
    spoken = texts or ["".join(message.content for message in document.messages) for document in conversations]
    return EncodedParcel(
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
    return draw(asked, f"split {seed}") < val_fraction


def all_text(document: Document) -> bytes:
    """Everything that a document says."""
    if isinstance(document, str):
        return document.encode()
    return "\0".join(f"{message.role}\0{message.content}" for message in document.messages).encode()


@contextmanager
def encoder(encode: Encode, num_workers: int) -> Iterator[Callable[[Iterable[Parcel]], Encoded]]:
    """A function that encodes a stream of parcels in order, in `num_workers` processes, of which this one is one."""
    others = num_workers - 1
    if others == 0:
        yield lambda parcels: ((parcel, encode(parcel.documents)) for parcel in parcels)
        return
    # Fresh processes: a fork would copy locks that the threads of this one (Arrow's, torch's) may hold.
    pool = ProcessPoolExecutor(others, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        for _ in range(others):
            pool.submit(int)  # a process starts at the first call: let them all start while the source is opened
        yield lambda parcels: _share(pool, others, encode, parcels)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory; run the same command again, it goes on where it was "
            "(a smaller --num_workers needs less memory)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _share(pool: ProcessPoolExecutor, others: int, encode: Encode, parcels: Iterable[Parcel]) -> Encoded:
    """Keep the other processes supplied; while they are, encode here. Give everything back in order."""
    waiting: deque[tuple[Parcel, Future[EncodedParcel]]] = deque()
    for parcel in parcels:
        if sum(not future.done() for _, future in waiting) < PARCELS_PER_WORKER * others:
            future = pool.submit(_work, parcel.documents)
        else:
            future = Future()
            future.set_result(encode(parcel.documents))
        waiting.append((parcel, future))
        while waiting and (waiting[0][1].done() or len(waiting) > 4 * PARCELS_PER_WORKER * others):
            parcel, future = waiting.popleft()
            yield parcel, future.result()
    for parcel, future in waiting:
        yield parcel, future.result()


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


def _work(documents: list[Document]) -> EncodedParcel:
    return _encode(documents)
