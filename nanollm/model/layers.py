"""Which small parts does every block share?  RMSNorm, rotary positions, SwiGLU.

Sources: RMSNorm arXiv:1910.07467; rotary positions arXiv:2104.09864; SwiGLU arXiv:2002.05202.
Letters: B rows, T tokens, D model width, F hidden width, R rotary width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angle for each pair.

    positions (B, T) or (T,), whole numbers; returns two float32 tensors (..., T, width / 2).
    Computed anew for each forward pass: a stored table would be rounded whenever a model is cast to bfloat16.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward pass stand, and what each of them may see."""

    positions: Tensor  # (B, T) or (T,) int64
    table: tuple[Tensor, Tensor]  # cosine and sine of the positions
    mask: Tensor | None  # (B, T, S), true where a token may look; None: at all tokens before it, or as `starts` says
    is_text: Tensor | None  # (B, T), false where a packed row is empty; None: everywhere
    starts: Tensor | None = None  # (B, T) int32, where each token's text begins in its row, for fused attention only
    is_fused: bool = False  # attention.cpp serves this pass


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs (2i, 2i+1) of x by their position's angle (DeepSeek's interleaved layout).

    x (B, T, H, R); table from rotary_table for these T positions. Same shape and type as x.
    """
    cos, sin = (part[..., None, :] for part in table)  # (..., T, 1, R/2): the same for all heads
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x).  x (..., D); gate and up (F, D); down (D, F)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class SwiGLU(nn.Module):
    """The dense feed-forward network of a block, without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
