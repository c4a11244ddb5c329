"""Who runs the model over tokens of many requests, and remembers them?

A runner holds a cache of rows, one request each, and the engine tells it which tokens to read. Letters: N tokens of one
pass, W logits wanted, V vocabulary, M Mixture-of-Experts blocks, K experts per token.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanollm.model.cache import LatentCache
from nanollm.model.transformer import Transformer

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one prompt."""

    row: int
    start: int  # position of the first
    ids: Ints
    is_last: bool  # the prompt ends here, so that its last token's logits are wanted


@dataclass(frozen=True)
class Work:
    """What one pass reads: pieces of prompts, and the newest token of each row that is replying."""

    pieces: list[Piece]
    rows: Ints  # (B,) rows that are replying
    tokens: Ints  # (B,) their newest tokens
    positions: Ints  # (B,) where these stand


@dataclass(frozen=True)
class Seen:
    """The answer: first for each piece that is_last, in order, then for each replying row."""

    logits: Tensor  # (W, V) float32
    experts: Ints  # (W, M, K)


class Runner(Protocol):
    """What the engine needs of a model."""

    cache_bytes: int

    def run(self, work: Work) -> Seen:
        """Read the tokens and remember them."""
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Let row `target` begin with the first `count` tokens of row `source`."""
        ...


class TorchRunner:
    """The model's own forward pass, on any device. Rows that run together are rounded together."""

    def __init__(self, model: Transformer, rows: int, length: int, longest_piece: int) -> None:
        self.model = model
        weight = model.head.weight
        # Pieces of different lengths are padded to the longest: behind the last slot there is room for that.
        self.cache = LatentCache.empty(model.config, rows, length + longest_piece, weight.dtype, weight.device)
        self.cache_bytes = self.cache.slots.nbytes

    def run(self, work: Work) -> Seen:
        answers = [self._read(work.pieces)] if work.pieces else []
        if len(work.rows):
            answers.append(self._forward(work.tokens[:, None], work.rows, work.positions, None))
        return Seen(
            torch.cat([answer.logits for answer in answers]), np.concatenate([answer.experts for answer in answers])
        )

    def copy(self, source: int, target: int, count: int) -> None:
        self.cache.slots[:, target, :count] = self.cache.slots[:, source, :count]

    def _read(self, pieces: list[Piece]) -> Seen:
        tokens = np.zeros((len(pieces), max(len(piece.ids) for piece in pieces)), dtype=np.int64)
        for line, piece in zip(tokens, pieces, strict=True):
            line[: len(piece.ids)] = piece.ids  # padding goes right, where no real token looks
        rows = np.array([piece.row for piece in pieces])
        last = np.array([len(piece.ids) - 1 for piece in pieces])
        return self._forward(
            tokens, rows, np.array([p.start for p in pieces]), last, np.array([p.is_last for p in pieces])
        )

    def _forward(
        self, tokens: Ints, rows: Ints, starts: Ints, last: Ints | None, wanted: npt.NDArray[np.bool_] | None = None
    ) -> Seen:
        """tokens (B, T) of these rows from these positions on; the answers at column `last` of the wanted ones."""
        device = self.cache.slots.device
        cache = LatentCache(self.cache.slots, torch.from_numpy(starts).clone(), torch.from_numpy(rows).to(device))
        with self.model.evaluating():
            for layer in self.model.moe_layers():
                layer.wants_choices = True
            hidden = self.model.trunk(torch.from_numpy(tokens).to(device), cache=cache)  # (B, T, D)
        lines = np.arange(len(tokens)) if wanted is None else wanted.nonzero()[0]
        columns = np.zeros(len(lines), dtype=np.int64) if last is None else last[lines]
        chosen = [layer.choices[lines, columns] for layer in self.model.moe_layers() if layer.choices is not None]
        for layer in self.model.moe_layers():
            layer.wants_choices, layer.choices = False, None
        return Seen(self.model.head(hidden[lines, columns]).float(), torch.stack(chosen, dim=1).cpu().numpy())
