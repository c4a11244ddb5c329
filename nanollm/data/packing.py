"""Packing: sequences share rows, so that little of a row stays empty.

Best-fit decreasing: the longest sequence first, each into the fullest row that still has room; at most 11/9 of the
fewest possible rows, and one (Johnson, Near-optimal bin packing algorithms, MIT 1973).
Letters: B rows, T places in a row; a sequence of n ids takes n - 1 places, for its last id is only predicted.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STEP = 32
"""Widths to choose from are multiples of this, so that few shapes occur: on CPUs a kernel is made and kept for each."""
WIDEST = 4  # rows wider than this many of the longest sequence are hardly fuller
NEARLY = 1.02  # how many times the least cost is as good as the least
MASK_DOUBLES = 1000
"""Width at which attention with a mask costs as much as everything else (docs/log.md, 2026-12-02)."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each index once and no row over `capacity`; the same lengths, the same rows.

    No two rows would fit into one. ValueError for a length that is not from 1 to `capacity`.
    """
    if odd := [length for length in lengths if not 1 <= length <= capacity]:
        raise ValueError(f"a row of {capacity:,} places takes sequences of 1 to {capacity:,}, got one of {odd[0]:,}")
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free places, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        insort(rooms, (room - length, row))
    return rows


def best_width(lengths: Sequence[int], limit: int, *, is_masked: bool) -> int:
    """How wide rows should be so that computing them costs least: of widths that are nearly as good, the narrowest.

    No wider than `limit`, which must hold the longest. Every place costs the same, with a mask (T, T) the more the
    wider the row is.
    """
    longest = max(lengths)
    least = -(-longest // STEP) * STEP
    coarse = max(1, least // (8 * STEP)) * STEP  # some 24 widths, however long the sequences are
    widths = [*range(least, min(limit, WIDEST * least) + 1, coarse)] or [limit]
    costs = {width: rows_cost(lengths, width, is_masked=is_masked) for width in widths}
    return min(width for width, cost in costs.items() if cost <= NEARLY * min(costs.values()))


def rows_cost(lengths: Sequence[int], width: int, *, is_masked: bool) -> float:
    """What computing the packed rows costs, in places without a mask."""
    return width * len(pack(lengths, width)) * (1 + is_masked * width / MASK_DOUBLES)


def even_rows(rows: int, most: int) -> int:
    """Rows of a portion, at most `most`, so that `rows` of them make the fewest batches and all are nearly full."""
    return -(-rows // -(-rows // most))


@dataclass(frozen=True)
class PackedLayout:
    """Where sequences stand in rows of T places; whatever goes with their tokens is put into the same places."""

    lengths: Sequence[int]  # tokens of each sequence
    rows: Sequence[Sequence[int]]  # the sequences of each row, from left to right; a row may be empty
    width: int  # T

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, multiple: int = 1) -> "PackedLayout":
        """Pack the sequences; empty rows make the number of rows a multiple of `multiple`, and at least that."""
        rows = pack(lengths, width)
        wanted = max(1, -(-len(rows) // multiple)) * multiple
        return cls(lengths, [*rows, *([] for _ in range(wanted - len(rows)))], width)

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        return sum(self.lengths) / (len(self.rows) * self.width)

    @cached_property
    def starts(self) -> Tensor:
        """Where each sequence begins in the flattened rows: (sequences,) int64; its row is that // width."""
        starts = [0] * len(self.lengths)
        for number, row in enumerate(self.rows):
            start = number * self.width
            for index in row:
                starts[index] = start
                start += self.lengths[index]
        return torch.tensor(starts)

    @cached_property
    def token_indices(self) -> Tensor:
        """The place in the flattened rows of every token of every sequence, in their order: (sum of lengths,) int64."""
        lengths = torch.tensor(self.lengths)
        ends = lengths.cumsum(0)
        return torch.arange(int(ends[-1])) + (self.starts - (ends - lengths)).repeat_interleave(lengths)

    def place(self, vectors: Sequence[Tensor], empty: float = 0) -> Tensor:
        """Put one vector for each sequence, with a value for each of its tokens, into the rows; `empty` elsewhere.

        vectors: (length,) each, all of one type; returns (B, T) of that type.
        """
        values = torch.cat(list(vectors))
        assert values.shape == self.token_indices.shape
        rows = values.new_full((len(self.rows) * self.width,), empty)
        rows[self.token_indices.to(values.device)] = values
        return rows.view(-1, self.width)
