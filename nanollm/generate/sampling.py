"""Which token comes next, given the logits?

Sources: top-p (nucleus) sampling, arXiv:1904.09751.
Letters: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanollm.data.order import Indices, mix

STREAM = np.uint64(0x5A3B1E)  # keeps these draws apart from other uses of the same hash


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose from the model's distribution."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens only (0: all)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def uniforms(seeds: Indices, draws: Indices) -> Tensor:
    """A number in [0, 1) for each pair of a row's seed and the count of its earlier draws: (B,) float32.

    There is no state: a row's numbers depend on its own seed and on nothing else in the batch.
    """
    words = mix(mix(seeds.astype(np.uint64), STREAM), draws.astype(np.uint64))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32)) * 2.0**-24


def sample(logits: Tensor, c: SamplingConfig, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability at this temperature (at 1 if that is 0) among all tokens.

    logits (B, V); numbers (B,) in [0, 1), one for each row to draw with. Returns (B,) int64 and (B,) float32.
    """
    scaled = logits.float() / (c.temperature or 1.0)
    logprobs = scaled.log_softmax(-1)
    if c.temperature == 0:
        ids = logits.argmax(-1)
    else:
        filters = c.top_k > 0 or c.top_p < 1
        probabilities = keep_likeliest(scaled, c).softmax(-1) if filters else logprobs.exp()
        ids = invert(probabilities, numbers.to(logits.device))
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Where in each row's cumulated probabilities (B, V) its number falls: (B,) int64, never a token of probability 0.

    A number has 24 bits, so that number * total stays below the total in float32.
    """
    cumulated = probabilities.cumsum(-1)
    return torch.searchsorted(cumulated, numbers[:, None] * cumulated[:, -1:], right=True)[:, 0]


def keep_likeliest(logits: Tensor, c: SamplingConfig) -> Tensor:
    """Set the logits (B, V) outside top-k, then outside top-p of what remains, to minus infinity."""
    if 0 < c.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(c.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if c.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not reached top_p: the first always stays.
        is_out = (probabilities.cumsum(-1) - probabilities) >= c.top_p
        logits = logits.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), -torch.inf)
    return logits
