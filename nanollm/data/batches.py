"""Batches: the tokens that a rank reads at a step, and those that it must predict.

A batch is a pure function of (seed, step, rank layout): there is no iterator to save, and a run continued on another
number of ranks sees the same windows, or conversations, in the same global order.
Letters: B rows, T context length. Window i is tokens [i*T, i*T + T + 1): the first T are read, the last T predicted.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanollm.data.order import Indices, Mixture, epoch_seed, permute, sample_indices
from nanollm.data.packing import PackedLayout
from nanollm.data.shards import Shards
from nanollm.text.chat import Cut, Marks, Shortened, shorten

IGNORE = -100  # a target that is not trained
PACKED_TOGETHER = 512  # conversations, for validation


@dataclass(frozen=True)
class Batch:
    """Rows to read and what to predict at each place."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE = not trained
    positions: Tensor | None = None  # (B, T) int64, 0 where a conversation begins; None: one text per row

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), positions)

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

    def split_micro_batches(self, rows: int) -> list["Batch"]:
        """The same rows in batches of that many."""
        known = [tensor for tensor in (self.tokens, self.targets, self.positions) if tensor is not None]
        return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in known), strict=True)]


class Windows:
    """The windows of a split, in a fresh random order each epoch."""

    def __init__(self, shards: Shards, context_length: int, seed: int) -> None:
        if shards.tokens_total < context_length + 1:
            raise ValueError(
                f"one window needs context_length + 1 = {context_length + 1:,} tokens, the split {shards.split!r} of "
                f"{shards.folder} has {shards.tokens_total:,}; prepare more text or take a smaller context_length"
            )
        self.shards, self.context_length, self.seed = shards, context_length, seed
        self.windows = (shards.tokens_total - 1) // context_length

    def micro_batches(
        self, step: int, batch_size: int, micro_batch_size: int, *, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """What one rank reads at a step, in batches; `batch_size` counts the windows of the step over all ranks.

        Micro-batch m of rank r is slice m * world + r of the step's windows, so that all slices in that order are the
        batch that one rank would read at once.
        """
        self.check(batch_size, micro_batch_size, world)
        assert 0 <= rank < world
        windows = sample_indices(step, batch_size, self.windows, self.seed).reshape(-1, world, micro_batch_size)
        return [_gather(self.shards, portion.tolist(), self.context_length) for portion in windows[:, rank]]

    def names(self, step: int, batch_size: int) -> dict[str, object]:
        """The numbers of the windows of a step: window i begins at token i * context_length of the split."""
        chosen = sample_indices(step, batch_size, self.windows, self.seed).tolist()
        return {f"windows of {self.shards.folder} {self.shards.split}": chosen}

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
        return [self.splits[source][number] for source, number in self._numbers(step, batch_size)]

    def names(self, step: int, batch_size: int) -> dict[str, object]:
        """The numbers of the conversations of a step, by the folder they lie in."""
        drawn = self._numbers(step, batch_size)
        return {
            f"conversations of {split.shards.folder} {split.shards.split}": [
                number for source, number in drawn if source == place
            ]
            for place, split in enumerate(self.splits)
        }

    def _numbers(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Split and number of each conversation of a step.

        Draw d of a split belongs to epoch d // n of its n conversations; each epoch is a fresh permutation of all n.
        """
        sources, draws = self.mixture.draws(step * batch_size, batch_size)
        epochs, places = np.divmod(draws, np.array(list(map(len, self.splits)))[sources])
        numbers = np.empty_like(draws)
        for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
            chosen = (sources == source) & (epochs == epoch)
            seed = epoch_seed(self.seed + (source << 32), epoch)  # each source in an order of its own
            numbers[chosen] = permute(places[chosen], len(self.splits[source]), seed)
        return list(zip(sources.tolist(), numbers.tolist(), strict=True))

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
