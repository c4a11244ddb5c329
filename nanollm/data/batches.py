"""Batches: the tokens that a rank reads at a step, and those that it must predict.

A batch is a pure function of (seed, step, rank layout): there is no iterator to save, and a run continued on another
number of ranks sees the same windows, or conversations, in the same global order.
Letters: B rows, T context length.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanollm.data.order import Indices, Mixture, mixed_indices
from nanollm.data.packing import PackedLayout, pack
from nanollm.data.shards import Shards
from nanollm.text.chat import Cut, Marks, Shortened, shorten
from nanollm.world import World

IGNORE = -100  # a target that is not trained
PACKED_TOGETHER = 512  # conversations, for validation
PIECES_TOGETHER = 4096  # of documents: more fill rows hardly better

Documents = Literal["across", "apart"]


@dataclass(frozen=True)
class Batch:
    """Rows to read and what to predict at each place."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE = not trained
    positions: Tensor | None = None  # (B, T) int64, 0 where a text begins; None: one text per row

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=device.type == "cuda") for tensor in self._known))

    def pin_memory(self) -> "Batch":
        """The same batch where a GPU can fetch it by itself."""
        return Batch(*(tensor.pin_memory() for tensor in self._known))

    @property
    def count(self) -> int:
        """Number of trained targets."""
        return int((self.targets != IGNORE).sum())

    @classmethod
    def of(cls, sequences: Sequence[Shortened], layout: PackedLayout) -> "Batch":
        """Sequences of n ids in n - 1 places each; every empty place is a text of its own, a token that sees itself."""
        ids = [torch.from_numpy(sequence.ids.astype(np.int64)) for sequence in sequences]
        targets = [
            torch.from_numpy(np.where(sequence.trained[1:], sequence.ids[1:].astype(np.int64), IGNORE))
            for sequence in sequences
        ]
        return cls(
            tokens=layout.place([sequence[:-1] for sequence in ids]),
            targets=layout.place(targets, empty=IGNORE),
            positions=layout.place([torch.arange(length) for length in layout.lengths]),
        )

    @classmethod
    def join(cls, batches: Iterable["Batch"]) -> "Batch":
        """The rows of all of them, one below the other."""
        return cls(*map(torch.cat, zip(*(batch._known for batch in batches), strict=True)))

    def split_micro_batches(self, rows: int) -> list["Batch"]:
        """The same rows in batches of that many."""
        return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in self._known), strict=True)]

    @property
    def _known(self) -> list[Tensor]:
        return [tensor for tensor in (self.tokens, self.targets, self.positions) if tensor is not None]


class TextShards:
    """The rows of a split of documents, by their numbers.

    across: windows of the running text: row i is tokens [i*T, i*T + T + 1), the first T read, the last T predicted.
    apart: pieces of documents, packed by best fit (arXiv:2404.10830), none of which sees another. A document that is
    longer than T + 1 tokens makes several pieces; a last one that would predict </s> alone is left out.
    """

    def __init__(self, shards: Shards, context_length: int, documents: Documents = "across") -> None:
        self.shards, self.context_length, self.is_packed = shards, context_length, documents == "apart"
        if self.is_packed:
            self._pack()
        elif shards.tokens_total < context_length + 1:
            raise ValueError(
                f"one window needs context_length + 1 = {context_length + 1:,} tokens, the split {shards.split!r} of "
                f"{shards.folder} has {shards.tokens_total:,}; prepare more text or take a smaller context_length"
            )

    def __len__(self) -> int:
        return len(self._borders) - 1 if self.is_packed else (self.shards.tokens_total - 1) // self.context_length

    def __getitem__(self, number: int) -> Batch:
        """One row."""
        if not self.is_packed:
            return _gather(self.shards, [number], self.context_length)
        pieces = self._pieces[self._borders[number] : self._borders[number + 1]]
        places = zip(self._starts[pieces].tolist(), self._lengths[pieces].tolist(), strict=True)
        ids = [self.shards.read(start, length + 1) for start, length in places]
        layout = PackedLayout(self._lengths[pieces].tolist(), [range(len(ids))], self.context_length)
        return Batch.of([Shortened(each, np.ones(len(each), bool)) for each in ids], layout)

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        return float(self._lengths.sum()) / (len(self) * self.context_length) if self.is_packed else 1.0

    def batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The split for validation, in batches of that many rows; with a limit, that many rows, spread evenly."""
        if not self.is_packed:
            return sequential_batches(self.shards, self.context_length, rows, limit)
        chosen = _spread(len(self), limit)
        parts = (chosen[first : first + rows] for first in range(0, len(chosen), rows))
        return (Batch.join(self[number] for number in part) for part in parts)

    def _pack(self) -> None:
        """Where each piece begins, how many places it takes, and which pieces share a row."""
        starts, width = self.shards.document_offsets(), self.context_length
        places = np.diff(starts, append=self.shards.tokens_total) - 1  # a document's last token is only predicted
        counts = (places - 2) // width + 1
        earlier = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # pieces of the same document
        self._starts = np.repeat(starts, counts) + earlier * width
        self._lengths = np.minimum(np.repeat(places, counts) - earlier * width, width)
        pieces, counts_by_row = [np.empty(0, np.int64)], [0]
        for first in range(0, len(self._lengths), PIECES_TOGETHER):
            rows = pack(self._lengths[first : first + PIECES_TOGETHER].tolist(), width)
            pieces.append(first + np.concatenate(rows))
            counts_by_row += map(len, rows)
        self._pieces, self._borders = np.concatenate(pieces), np.cumsum(counts_by_row)


class Windows:
    """The rows of one or several splits in a mixture, each split in a fresh random order each epoch."""

    def __init__(self, splits: Sequence[TextShards], mixture: Mixture, seed: int) -> None:
        self.splits, self.mixture, self.seed = splits, mixture, seed

    def micro_batches(
        self, step: int, batch_size: int, micro_batch_size: int, *, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """What one rank reads at a step, in batches; `batch_size` counts the rows of the step over all ranks.

        Micro-batch m of rank r is slice m * world + r of the step's rows, so that all slices in that order are the
        batch that one rank would read at once.
        """
        self.check(batch_size, micro_batch_size, world)
        assert 0 <= rank < world
        drawn = _numbers(self, step, batch_size)
        firsts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
        portions = (drawn[first : first + micro_batch_size] for first in firsts)
        return [Batch.join(self.splits[source][number] for source, number in portion) for portion in portions]

    def names(self, step: int, batch_size: int) -> dict[str, object]:
        """The numbers of the rows of a step, by the folder they lie in."""
        return _names("windows", [split.shards for split in self.splits], _numbers(self, step, batch_size))

    def check(self, batch_size: int, micro_batch_size: int, world: int) -> None:
        """Raises ValueError unless a step's windows divide evenly over ranks and micro-batches."""
        if micro_batch_size < 1 or batch_size < 1 or batch_size % (micro_batch_size * world):
            raise ValueError(
                f"the batch of {batch_size} windows must divide evenly into micro-batches of {micro_batch_size} on "
                f"{world} processes; take a multiple of {micro_batch_size * world} as train.batch_size"
            )


def sequential_batches(
    shards: Shards, context_length: int, batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """The split in order, for validation: each token but the first is predicted once.

    With a limit, that many windows, spread evenly. The last batch may have fewer rows, and the last window's missing
    end is IGNORE.
    """
    if shards.tokens_total < 2:
        raise ValueError(f"the split {shards.split!r} of {shards.folder} has one token: nothing to predict")
    windows = -(-(shards.tokens_total - 1) // context_length)
    chosen = _spread(windows, limit)
    for first in range(0, len(chosen), batch_size):
        yield _gather(shards, chosen[first : first + batch_size], context_length)


def _spread(total: int, limit: int | None) -> list[int]:
    """All numbers below the total, or with a limit that many, spread evenly."""
    taken = total if limit is None else min(total, limit)
    return [number * total // taken for number in range(taken)]


def _gather(shards: Shards, windows: Sequence[int], context_length: int) -> Batch:
    tokens = np.zeros((len(windows), context_length), dtype=np.int64)
    targets = np.full((len(windows), context_length), IGNORE, dtype=np.int64)
    for row, window in enumerate(windows):
        start = window * context_length
        length = min(context_length, shards.tokens_total - 1 - start)  # shorter only at the end of a split
        ids = shards.read(start, length + 1)
        tokens[row, :length] = ids[:-1]
        targets[row, :length] = ids[1:]
        if shards.has_flags:
            targets[row, :length][shards.flags_read(start + 1, length) == 0] = IGNORE
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class ChatShards:
    """The conversations of a split by their numbers, each cut to the context length + 1 ids that fill a row."""

    def __init__(self, shards: Shards, context_length: int, marks: Marks) -> None:
        if not shards.has_flags:
            raise ValueError(
                f"{shards.folder} holds documents, expected conversations "
                f"(nanollm preprocess sni, gsm8k, words or chat)"
            )
        self.shards, self.context_length, self.marks = shards, context_length, marks
        self._borders = np.append(shards.document_offsets(), shards.tokens_total)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, number: int) -> Shortened:
        start, end = map(int, self._borders[number : number + 2])
        ids, flags = self.shards.read(start, end - start), self.shards.flags_read(start, end - start)
        return shorten(ids, flags.astype(bool), self.context_length + 1, self.marks)

    @property
    def longer(self) -> Indices:
        """The numbers of the conversations that do not fit whole."""
        return np.flatnonzero(np.diff(self._borders) > self.context_length + 1)

    def cuts(self, limit: int) -> Counter[Cut]:
        """What becomes of those that do not fit, counted over at most `limit` of them, spread evenly."""
        longer = self.longer
        return Counter(cut for place in _spread(len(longer), limit) for cut in self[longer[place]].cuts)

    def batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The split for validation: each conversation once, packed, in batches of that many rows.

        With a limit, that many conversations, spread evenly.
        """
        chosen = _spread(len(self), limit)
        for first in range(0, len(chosen), PACKED_TOGETHER):
            conversations = [self[number] for number in chosen[first : first + PACKED_TOGETHER]]
            layout = layout_of(conversations, self.context_length, rows)
            yield from Batch.of(conversations, layout).split_micro_batches(rows)


def layout_of(conversations: Sequence[Shortened], context_length: int, multiple: int) -> PackedLayout:
    """Where the conversations stand in as few rows as packing finds, and empty rows up to a multiple."""
    return PackedLayout.of([len(each.ids) - 1 for each in conversations], context_length, multiple)


class Conversations:
    """The conversations of one or several splits in a mixture, each split in a fresh random order each epoch."""

    def __init__(self, splits: Sequence[ChatShards], mixture: Mixture, seed: int) -> None:
        self.splits, self.mixture, self.seed = splits, mixture, seed
        (self.context_length,) = {split.context_length for split in splits}

    def draw(self, step: int, batch_size: int) -> list[Shortened]:
        """The conversations of one step in their global order, whatever the number of ranks."""
        return [self.splits[source][number] for source, number in _numbers(self, step, batch_size)]

    def names(self, step: int, batch_size: int) -> dict[str, object]:
        """The numbers of the conversations of a step, by the folder they lie in."""
        return _names("conversations", [split.shards for split in self.splits], _numbers(self, step, batch_size))

    def micro_batches(
        self, step: int, batch_size: int, micro_batch_size: int, *, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """What one rank reads at a step, in batches of `micro_batch_size` rows, the last ones perhaps empty.

        `batch_size` counts the conversations of the step over all ranks. They are packed once for all, so that every
        rank has as many batches: micro-batch m of rank r is slice m * world + r of the step's rows.
        """
        if batch_size < 1 or micro_batch_size < 1:
            raise ValueError(f"a step needs at least 1 conversation and 1 row, got {batch_size} and {micro_batch_size}")
        assert 0 <= rank < world
        conversations = self.draw(step, batch_size)
        layout = layout_of(conversations, self.context_length, micro_batch_size * world)
        return Batch.of(conversations, layout).split_micro_batches(micro_batch_size)[rank::world]


class Fetcher:
    """What this rank reads at a step. For a GPU a thread makes the next step's batches meanwhile."""

    def __init__(self, source: Windows | Conversations, batch_size: int, micro_batch_size: int, world: World) -> None:
        self._make = partial(source.micro_batches, rank=world.rank, world=world.size)
        self._sizes = batch_size, micro_batch_size
        self._thread = ThreadPoolExecutor(1) if world.device.type == "cuda" else None
        self._ahead = dict[int, Future[list[Batch]]]()  # by step

    def __call__(self, step: int) -> list[Batch]:
        if self._thread is None:
            return self._make(step, *self._sizes)
        own = self._ahead.get(step) or self._thread.submit(self._pinned, step)
        self._ahead = {step + 1: self._thread.submit(self._pinned, step + 1)}
        return own.result()

    def _pinned(self, step: int) -> list[Batch]:
        return [batch.pin_memory() for batch in self._make(step, *self._sizes)]


def _numbers(drawn: Windows | Conversations, step: int, batch_size: int) -> list[tuple[int, int]]:
    """Split and number of each sample of a step, in their global order."""
    sizes = [*map(len, drawn.splits)]
    sources, numbers = mixed_indices(step, batch_size, sizes, drawn.mixture, drawn.seed)
    return list(zip(sources.tolist(), numbers.tolist(), strict=True))


def _names(what: str, splits: Sequence[Shards], drawn: Sequence[tuple[int, int]]) -> dict[str, object]:
    return {
        f"{what} of {shards.folder} {shards.split}": [number for source, number in drawn if source == place]
        for place, shards in enumerate(splits)
    }
