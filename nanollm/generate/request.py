"""What is asked of the engine, and what does it give back?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nanollm.generate.sampling import SamplingConfig

Finish = Literal["end", "stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, how to choose what follows it, and when to end."""

    prompt: Sequence[int]
    """Ids; a document starts with the <s> token."""
    max_tokens: int
    """Most tokens of the reply, its end token included."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the reply and are left out of it."""
    stop: Callable[[int], bool] | None = None
    """Told every token of the reply in order; true ends the reply with this one."""
    seed: int = 0
    """The only source of this request's random numbers."""
    top_logprobs: int | None = None
    """Say of every token how likely it was, which others were the likeliest (this many) and which experts chose."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ValueError(f"top_logprobs must be at least 0, got {self.top_logprobs}")


@dataclass(eq=False)
class Completion:
    """What a request was answered with, so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of every token drawn, at the sampling temperature, before penalty, bias and filters: those of ids
    and, last, that of the end token if one was drawn."""
    finish: Finish | None = None
    """end: an end token; stop: the stop function; length: no room or tokens left; None: not finished."""
    end_id: int | None = None
    """The end token, if one was drawn."""


@dataclass(frozen=True, slots=True)
class Scored:
    """How the model saw a token that was drawn: at temperature 1, before penalty, bias and filters."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their log-probabilities, likeliest first."""
    experts: list[list[int]]
    """For each Mixture of Experts, the experts chosen in the pass that predicted this token."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One more token of a completion."""

    completion: Completion
    token: int
    scored: Scored | None


Ints = npt.NDArray[np.int64]
Quantize = Literal["none", "int8"]
Kernels = Literal["auto", "native", "torch"]


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
    cache_bytes_per_token: int
    weight_bytes: int
    """Bytes of one weight."""

    def run(self, work: Work) -> Seen:
        """Read the tokens and remember them."""
        ...

    def copy(self, source: int, target: int, count: int) -> None:
        """Let row `target` begin with the first `count` tokens of row `source`."""
        ...
