"""Which token comes next, given the logits?

Sources: top-p (nucleus) sampling, arXiv:1904.09751.
Letters: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


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


def sample(logits: Tensor, c: SamplingConfig, generators: Sequence[Generator]) -> Tensor:
    """One token per row: logits (B, V) to (B,) int64. Each row draws from its own generator and from nothing else."""
    if c.temperature == 0:
        return logits.argmax(-1)
    probabilities = keep_likeliest(logits.float() / c.temperature, c).softmax(-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


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
