"""What the engine and its runners are asked, and what they answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nanollm.generate.sampling import SamplingConfig

MakeTool = Callable[[], Callable[[int], Sequence[int]]]
"""Makes the `Request.tool` of a reply."""
Finish = Literal["end", "stop", "length", "cancelled", "failed"]


class Mask(Protocol):
    """What a reply may say (generate/constraints.py)."""

    def allow(self, address: int, /) -> None:
        """Set the bit of each token that may come next, in a row of zeros there."""
        ...

    def take(self, token: int, /) -> bool:
        """Go on with this token, if it may come next."""
        ...

    @property
    def reason(self) -> str:
        """Why nothing may come next."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, how to choose what follows it, and when to end."""

    prompt: Sequence[int]
    """Ids; a document starts with the <s> token."""
    max_tokens: int
    """Most tokens of the reply, its end token included."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the reply and are left out of it."""
    stop: Callable[[int], bool] | None = None
    """Told every token of the reply in order; true ends the reply with this one."""
    tool: Callable[[int], Sequence[int]] | None = None
    """Told every sampled token in order; what it returns is appended behind that token, as far as there is room
    (generate/tools.py). A reply goes on where something follows its end token (generate/turns.py)."""
    constraint: Mask | None = None
    """Asked of every token of this reply whether it may come. Not with a tool, which writes what it likes."""
    adapter: str | None = None
    """One of the engine's, by its name; None: the model itself."""
    seed: int = 0
    """The only source of this request's random numbers."""
    top_logprobs: int | None = None
    """Say of every token how likely it was, which others were the most likely (this many) and which experts chose."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, which are then read anew even where another row holds them."""

    @property
    def is_plain(self) -> bool:
        """Whether its tokens are drawn from the whole distribution, and nothing else is asked of it."""
        is_free = self.constraint is None and self.top_logprobs is None and self.adapter is None
        return is_free and not (self.sampling.filters or self.sampling.shifts)

    def __post_init__(self) -> None:
        assert self.constraint is None or self.tool is None
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


@dataclass(eq=False)
class Completion:
    """What a request was answered with, so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of every token drawn, at the sampling temperature, before penalty, bias and filters: those of ids
    (0 for one that a tool gave) and, last, that of the end token if one was drawn."""
    is_sampled: list[bool] = field(default_factory=list)
    """Of each of ids: whether the model sampled it; if not, a tool gave it."""
    finish: Finish | None = None
    """end: an end token; stop: the stop function; length: no room or tokens left; failed: its constraint gave up; None:
    not finished."""
    failure: str | None = None  # why it failed
    stop_token_id: int | None = None  # the end token, if one was drawn
    prompt_logprobs: list["TokenLogprobs"] = field(default_factory=list)
    """Where they were asked for: of each token of the prompt but the first, complete when the first token is drawn."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: at temperature 1, before penalty, bias and filters."""

    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens and their log-probabilities, most likely first
    experts: list[list[int]]
    """For each Mixture of Experts, the experts chosen in the pass that predicted this token."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One more sampled token of a completion."""

    completion: Completion
    token: int
    logprobs: TokenLogprobs | None
    given: Sequence[int] = ()
    """What a tool appended behind it."""


Ints = npt.NDArray[np.int64]
Quantize = Literal["none", "int8", "int4"]
Kernels = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class PromptChunk:
    """Neighbouring tokens of one prompt, to be prefilled together."""

    row: int
    start: int  # position of the first
    ids: Ints
    is_last: bool  # the prompt ends here, so that its last token's logits are wanted
    adapter: int = -1  # number of the engine's; -1: none
    is_scored: bool = False  # the logits of all tokens are wanted

    @property
    def wanted(self) -> range:
        """Which of its tokens' logits are wanted."""
        return range(0 if self.is_scored else len(self.ids) - self.is_last, len(self.ids))


@dataclass(frozen=True)
class Draws:
    """How the next token of each decoding row is drawn, from the whole distribution."""

    temperatures: list[float]  # 0: the most likely
    seeds: Ints
    counts: Ints  # of tokens drawn before


@dataclass(frozen=True)
class ScheduledBatch:
    """What one pass reads: chunks of prompts, and the last token of each row that is decoding."""

    chunks: list[PromptChunk]
    rows: Ints  # (B,) rows that are decoding
    tokens: Ints  # (B,) their last tokens
    positions: Ints  # (B,) where these stand
    adapters: Ints  # (B,) as in PromptChunk
    draws: Draws | None = None  # for a runner that draws, where all rows are plain


@dataclass(frozen=True)
class ModelOutput:
    """First for the `wanted` tokens of each chunk, in order, then, unless they are drawn, for each decoding row."""

    logits: Tensor  # (W, V) float32
    experts: Tensor  # (W, M, K): the K experts chosen in each of M MoE blocks
    drawn: tuple[list[int], list[float]] | None = None  # ids and log-probabilities of the decoding rows


class Runner(Protocol):
    """What the engine needs of a model."""

    cache_bytes: int
    cache_bytes_per_token: int
    weight_bytes: float  # bytes of one weight, on average
    draws: bool  # whether it draws the tokens of plain requests

    def run(self, batch: ScheduledBatch) -> ModelOutput:
        """Read the tokens and remember them."""
        ...

    def copy(self, source: int, targets: Sequence[int], count: int) -> None:
        """Let the rows `targets` begin with the first `count` tokens of row `source`."""
        ...
