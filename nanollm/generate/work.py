"""What does the engine hand to whoever runs the model, and what comes back?

Letters: N tokens of one pass, W logits wanted, V vocabulary, M Mixture-of-Experts blocks, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

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
