"""What is asked of the engine, and what does it give back?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
