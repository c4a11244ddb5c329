"""Which tokens does a rank see at a step, and which of them must it predict?

A batch is a pure function of (seed, step, rank layout): there is no iterator to save, and a run continued on another
number of ranks sees the same windows in the same global order.
Letters: B rows, T context length. Window i is tokens [i*T, i*T + T + 1): the first T are read, the last T predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanollm.data.order import sample_indices
from nanollm.data.shards import Shards

IGNORE = -100  # a target that is not trained


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
        """What one rank reads at a step, in portions; `batch_size` counts the windows of the step over all ranks.

        Micro-batch m of rank r is slice m * world + r of the step's windows, so that all slices in that order are the
        batch that one rank would read at once.
        """
        if micro_batch_size < 1 or batch_size < 1 or batch_size % (micro_batch_size * world):
            raise ValueError(
                f"the batch of {batch_size} windows must divide evenly into micro-batches of {micro_batch_size} on "
                f"{world} ranks; take a multiple of {micro_batch_size * world}"
            )
        assert 0 <= rank < world
        windows = sample_indices(step, batch_size, self.windows, self.seed).reshape(-1, world, micro_batch_size)
        return [_gather(self.shards, portion.tolist(), self.context_length) for portion in windows[:, rank]]


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
    taken = windows if limit is None else min(windows, limit)
    chosen = [number * windows // taken for number in range(taken)]
    for first in range(0, taken, batch_size):
        yield _gather(shards, chosen[first : first + batch_size], context_length)


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
