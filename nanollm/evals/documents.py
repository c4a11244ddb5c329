"""Reads the documents that a model is measured on, or that its problems are searched in.

Files (.txt, .jsonl, .csv, .parquet, packed or not) give their records, a prepared folder the documents that it was made
of: ids become text again, because prepared text is lossless.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch

from nanollm.bundle import Bundle
from nanollm.data.batches import IGNORE, Batch, ChatShards, sequential_batches
from nanollm.data.shards import MANIFEST, PROGRESS, Shards
from nanollm.evals.bits_per_byte import Documents, Numbered, by_document
from nanollm.progress import Progress, say
from nanollm.sources.files import BadRecord, OnBad, find_files, read_texts
from nanollm.text.chat import Marks
from nanollm.text.tokenizer import Tokenizer

BATCH_TOKENS = 16_384  # of a batch: enough to keep a device busy
BATCHES_AT_ONCE = 8  # so many are filled together, so that rows of like lengths share one


def is_prepared(path: Path) -> bool:
    """Whether a folder is one of token files, finished or not."""
    return (path / MANIFEST).exists() or (path / PROGRESS).exists()


def check(path: Path, tokenizer: Tokenizer) -> None:
    """Raise, before anything long begins, what reading these documents would raise."""
    if is_prepared(path):
        Shards.open(path, tokenizer_fingerprint=tokenizer.fingerprint, verify="size")  # `read` reads every byte
    else:
        find_files([path])


def read(path: Path, text_column: str, tokenizer: Tokenizer, on_bad: OnBad) -> Iterator[tuple[str, str]]:
    """(where it stands, its text) of each document of a file, a folder of files, or the split train of a prepared one.

    A prepared folder must have been written with this tokenizer.
    """
    if is_prepared(path):
        yield from _read_prepared(path, tokenizer)
        return
    for file in find_files([path]):
        for number, text in enumerate(read_texts([file], text_column, on_bad), start=1):
            yield f"{file}, document {number:,}", text


def read_all(path: Path, text_column: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """What `read` gives, with a bar; bad records are left out, and said."""
    bad: list[BadRecord] = []
    with Progress(f"reading {path}", unit="documents") as bar:
        for document in read(path, text_column, tokenizer, bad.append):
            yield document
            bar.advance()
    if bad:
        say(f"{path}: {len(bad):,} bad records were left out, the first: {bad[0]}")


def _read_prepared(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    shards = Shards.open(folder, tokenizer_fingerprint=tokenizer.fingerprint)
    starts = [*shards.document_offsets().tolist(), shards.tokens_total]
    is_mark = tokenizer.token_bytes == 0
    for number, (start, end) in enumerate(pairwise(starts), start=1):
        ids = shards.read(start, end - start)
        # A mark stands between two messages and has no text: without a border their words would run together.
        messages = np.split(ids, np.flatnonzero(is_mark[ids]))
        text = "\n".join(filter(None, (tokenizer.decode(message.tolist()) for message in messages)))
        yield f"{folder}, train document {number:,}", text


def bits_of_texts(bundle: Bundle, texts: Iterable[str]) -> Documents:
    """Bits per byte of texts, each by itself."""
    rows = numbered_batches(texts, bundle.tokenizer, bundle.model.config.context_length)
    return by_document(bundle.model, rows, bundle.tokenizer.token_bytes)


def bits_of_prepared(bundle: Bundle, folder: Path) -> Documents:
    """Bits per byte of the split val: windows as in pretraining, or conversations as in fine-tuning."""
    shards = Shards.open(folder, "val", tokenizer_fingerprint=bundle.tokenizer.fingerprint)
    context = bundle.model.config.context_length
    rows = max(1, BATCH_TOKENS // context)
    if shards.kind == "text":
        found = sequential_batches(shards, context, rows)
    else:
        found = ChatShards(shards, context, Marks.of(bundle.tokenizer)).batches(rows)
    return by_document(bundle.model, numbered(found, bundle.tokenizer.bos_id), bundle.tokenizer.token_bytes)


def numbered(found: Iterable[Batch], bos_id: int) -> Numbered:
    """Batches that follow each other, with the number of the document at each place: one begins at each <s>."""
    before = 0
    for batch in found:
        numbers = before + (batch.tokens == bos_id).flatten().cumsum(0).view_as(batch.tokens)
        before = int(numbers[-1, -1])
        yield batch, numbers


def numbered_batches(texts: Iterable[str], tokenizer: Tokenizer, context_length: int) -> Numbered:
    """Batches in which each document stands by itself and each of its tokens but the first is predicted once.

    A document is <s> text </s>; a long one is cut into consecutive windows of `context_length` predictions, each of
    which sees only its own window. With each row comes the number of its document.
    """
    rows = max(1, BATCH_TOKENS // context_length)
    windows = _windows(texts, tokenizer, context_length)
    while some := sorted(islice(windows, rows * BATCHES_AT_ONCE), key=lambda window: len(window[1])):
        for first in range(0, len(some), rows):
            numbers, ids = zip(*some[first : first + rows], strict=True)
            yield _batch(ids), torch.tensor(numbers)[:, None]


def _windows(texts: Iterable[str], tokenizer: Tokenizer, context_length: int) -> Iterator[tuple[int, list[int]]]:
    for number, text in enumerate(texts):
        ids = tokenizer.encode_document(text)
        for start in range(0, len(ids) - 1, context_length):
            yield number, ids[start : start + context_length + 1]


def _batch(windows: Sequence[list[int]]) -> Batch:
    """Windows of up to T + 1 ids as rows of T places; what stays empty is not predicted, and nothing looks at it."""
    longest = max(map(len, windows)) - 1
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    targets = torch.full((len(windows), longest), IGNORE)
    for row, window in enumerate(windows):
        tokens[row, : len(window) - 1] = torch.tensor(window[:-1])
        targets[row, : len(window) - 1] = torch.tensor(window[1:])
    return Batch(tokens, targets)
