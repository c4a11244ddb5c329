"""Sampling: the next token of each row, from its logits and a random number of its own.

Sources: top-p (nucleus) sampling, arXiv:1904.09751; repetition penalty, arXiv:1909.05858, section 4.1; min-p,
arXiv:2407.01082.
Letters: B rows, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanollm.data.order import Indices, mix

MIN_TEMPERATURE = 1e-4  # below this, and above 0, logits over temperature may leave float32

DRAWN, REDRAWN = np.uint64(0x5A3B1E), np.uint64(0xC057A1)  # keep draws apart, and from other uses of the same hash

Bits = npt.NDArray[np.uint8]
"""(B, bytes): a bit for each token that a row may draw, in multiples of 8 bytes, lowest first."""
IS_ALLOWED = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
OF_BITS = np.where(IS_ALLOWED, np.float32(0), -np.float32(np.inf))
"""(256, 8): what a byte of these adds to the logits of its eight tokens: twenty times as fast as a mask of bools."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose from the model's distribution."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Choose among the k most likely tokens only (0: all)."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Choose among the tokens at least this share as likely as the most likely (0: all)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens already in prompt or reply, and multiplies the negative ones (1: off)."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (always the most likely token) or at least {MIN_TEMPERATURE}, "
                f"got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0 (1: off), got {self.repetition_penalty}")
        if any(token < 0 for token in self.logit_bias) or not all(map(math.isfinite, self.logit_bias.values())):
            raise ValueError(f"logit_bias must map token ids to finite numbers, got {self.logit_bias}")

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def shifts(self) -> bool:
        """Whether some logits are changed before the draw."""
        return self.repetition_penalty != 1 or bool(self.logit_bias)


def uniforms(seeds: Indices, draws: Indices, stream: np.uint64 = DRAWN) -> Tensor:
    """A number in [0, 1) for each pair of a row's seed and the count of its earlier draws: (B,) float32.

    There is no state: a row's numbers depend on its own seed and on nothing else in the batch.
    """
    words = mix(mix(seeds.astype(np.uint64), stream), draws.astype(np.uint64))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32)) * 2.0**-24


def sample(
    logits: Tensor, c: SamplingConfig, numbers: Tensor, seen: Iterable[Tensor] = (), allowed: Bits | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability at this temperature (at 1 if that is 0) among all tokens.

    logits (B, V); numbers (B,) in [0, 1), one for each row to draw with; seen: for each row the ids (n,) that the
    repetition penalty falls on. Returns (B,) int64 and (B,) float32. A row's answer depends on that row alone.
    """
    logits = logits.float()
    shifted = shift(logits, c, seen) if c.shifts else logits
    if allowed is not None:
        added = OF_BITS.take(allowed, axis=0).reshape(len(allowed), -1)[:, : logits.shape[-1]]
        shifted = shifted + torch.from_numpy(added).to(logits.device)
    logprobs = (logits / (c.temperature or 1.0)).log_softmax(-1)
    if c.temperature == 0:
        ids = shifted.argmax(-1)
    else:
        is_plain = shifted is logits and not c.filters
        probabilities = logprobs.exp() if is_plain else filter_logits(shifted / c.temperature, c).softmax(-1)
        ids = invert(probabilities, numbers.to(logits.device))
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def draw(logits: Tensor, temperatures: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What `sample` gives without filters and shifts, of rows at temperatures (B,) of their own, without a word to the
    host. logits (B, V) float32."""
    is_drawn = temperatures > 0
    logprobs = (logits / torch.where(is_drawn, temperatures, 1.0)[:, None]).log_softmax(-1)
    ids = torch.where(is_drawn, invert(logprobs.exp(), numbers), logits.argmax(-1))
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def shift(logits: Tensor, c: SamplingConfig, seen: Iterable[Tensor]) -> Tensor:
    """Logits (B, V) after the bias and the repetition penalty on the ids that each row has seen."""
    logits = logits.clone()
    for token, bias in c.logit_bias.items():
        logits[:, token] += bias
    if c.repetition_penalty != 1:
        for row, ids in zip(logits, seen, strict=True):
            repeated = row[ids]
            row[ids] = torch.where(repeated > 0, repeated / c.repetition_penalty, repeated * c.repetition_penalty)
    return logits


def invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Where in each row's cumulated probabilities (B, V) its number falls: (B,) int64, never a token of probability 0.

    A number has 24 bits, so that number * total stays below the total in float32.
    """
    cumulated = probabilities.cumsum(-1)
    return torch.searchsorted(cumulated, numbers[:, None] * cumulated[:, -1:], right=True)[:, 0]


def filter_logits(logits: Tensor, c: SamplingConfig) -> Tensor:
    """Set the logits (B, V) outside top-k, outside min-p, then outside top-p of what remains, to minus infinity."""
    if 0 < c.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(c.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if c.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(c.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if c.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not reached top_p: the first always stays.
        is_out = (probabilities.cumsum(-1) - probabilities) >= c.top_p
        logits = logits.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), -torch.inf)
    return logits
