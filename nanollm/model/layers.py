"""The small layers that all blocks share: RMSNorm, rotary positions, SwiGLU.

Sources: RMSNorm arXiv:1910.07467; rotary positions arXiv:2104.09864; SwiGLU arXiv:2002.05202.
Letters: B rows, T tokens, D model width, F hidden width, R rotary width.
"""

from dataclasses import dataclass
from typing import Any

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
        normed: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _Normalise(torch.autograd.Function):
    """Keeps x in its own type and one number per vector, where autograd would keep float32 copies of all of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, factor)
        return in_type(x.dtype, wide * factor * weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        unit, grad = widened(x) * factor, widened(grad)
        of_unit = grad * weight
        of_x = (of_unit - unit * (of_unit * unit).mean(-1, keepdim=True)).mul_(factor)
        of_weight = (grad * unit).flatten(0, -2).sum(0)
        return in_type(x.dtype, of_x), in_type(weight.dtype, of_weight), None


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def in_type(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x in a type, and x itself if it has that type.

    The forward pass of a Function must return neither `x.to(its own type)` nor what it wrote to in place: torch.compile
    of PyTorch 2.11 then loses its gradient (https://github.com/pytorch/pytorch/issues/180642).
    """
    return x if x.dtype == dtype else x.to(dtype)


def rotary_table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angle for each pair.

    positions (B, T) or (T,), whole numbers; returns two float32 tensors (..., T, width / 2).
    Computed anew for each forward pass: a stored table would be rounded whenever a model is cast to bfloat16.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class CachePlaces:
    """Where a cache keeps the tokens of a forward pass, and what they may look at there."""

    positions: Tensor  # (B, T) int64
    targets: Tensor  # (B * T,) int64: the slots that they are written to
    mask: Tensor  # (B, T, S'): which of the first S' slots of its row each may look at
    rows: Tensor | None = None  # (B,) int64: the rows that they look at; None: the first B, in order


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of a forward pass stand, and what each of them may see."""

    positions: Tensor  # (B, T) or (T,) int64
    table: tuple[Tensor, Tensor]  # cosine and sine of the positions
    mask: Tensor | None  # (B, T, S), true where a token may look; None: at all tokens before it, or as `spans` says
    is_text: Tensor | None  # (B, T), false where a packed row is empty; None: everywhere
    spans: Tensor | None = None  # (B, T, 3) int32 as in transformer.text_spans, for fused attention only
    is_fused: bool = False  # attention.cpp serves this pass
    places: CachePlaces | None = None  # with a cache


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring pairs (2i, 2i+1) of x by their position's angle (DeepSeek's interleaved layout).

    x (B, T, H, R); table from rotary_table for these T positions. Same shape and type as x.
    """
    turned: Tensor = _Rotate.apply(x, *table)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """Keeps the angles only: the way back is to turn the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, R), cos and sin (..., T, R/2)."""
    cos, sin = cos[..., None, :], sin[..., None, :]  # the same for all heads
    even, odd = widened(x).unflatten(-1, (-1, 2)).unbind(-1)
    return in_type(x.dtype, torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2))


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x).  x (..., D); gate and up (F, D); down (D, F)."""
    y: Tensor = _GatedDown.apply(F.linear(x, gate), F.linear(x, up), down)  # type: ignore[no-untyped-call]
    return y


class _GatedDown(torch.autograd.Function):
    """down(silu(gate) * up): keeps gate and up, of the four widths F that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = ctx.saved_tensors
        opened = F.silu(gate)
        of_hidden = grad @ down  # (..., F)
        of_down = grad.flatten(0, -2).T @ (opened * up).flatten(0, -2)
        of_up = opened.mul_(of_hidden)
        return torch.ops.aten.silu_backward(of_hidden.mul_(up), gate), of_up, of_down


class SwiGLU(nn.Module):
    """The dense feed-forward network of a block, without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
