"""Causal attention for training on a CPU that multiplies bfloat16, and its gradient, as a custom operator of PyTorch.

PyTorch's own fused attention reaches a quarter of what such a processor multiplies without AMX, and needs a mask of
T x T where several texts lie in a row. attention.cpp is compiled on this machine when it is needed for the first time
(build.py); everywhere else PyTorch's attention serves.
Letters: B rows, T tokens, H heads, N width without position, R rotary width, V value width.
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanollm.kernels import build
from nanollm.progress import say

SOURCE = Path(__file__).with_name("attention.cpp")
PANEL = 32
POINTERS = (
    *("spans", "q", "kv", "key_rope", "out", "sums"),
    *("out_grad", "q_grad", "kv_grad", "key_rope_grad", "key_rope_shares"),
)


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "tokens", "heads", "nope", "rope", "value", "threads")),
        ("scale", c_float),
        *((name, c_void_p) for name in POINTERS),
    )


@cache
def library() -> ctypes.CDLL | None:
    """attention.cpp, compiled for this processor; None, with a word about it, where that fails."""
    try:
        loaded = build.load(SOURCE)
    except build.NoCompilerError as error:
        say(f"attention runs on PyTorch's operations, which takes several times as long: {error}")
        return None
    for function in (loaded.attend, loaded.attend_backward):
        function.argtypes = [POINTER(Attention)]
    return loaded


@cache
def is_slow_without() -> bool:
    """Whether this processor multiplies bfloat16, but not in the tiles (AMX) that PyTorch's attention is made for."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def fits(nope: int, rope: int, value: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention.cpp is made for heads of these widths (N, R, V) on such a machine."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and (nope + rope) % PANEL == value % PANEL == nope % 2 == 0
        and is_slow_without()
    )


def serves(nope: int, rope: int, value: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention.cpp is the one to ask, for heads of these widths; compiles it if it is."""
    return fits(nope, rope, value, dtype, device) and library() is not None


@torch.library.custom_op("nanollm::attend", mutates_args=())
def attend(q: Tensor, kv: Tensor, k_rope: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Every token looks back at its own text.

    q (B, T, H, N + R), kv (B, T, H, N + V), k_rope (B, T, R), all bfloat16; spans (B, T, 3) int32: where each token may
    look, as in model/transformer.text_spans; None: at all before it. Returns the answers (B, T, H, V), and for the
    backward pass the log of each sum of exponentials (B, H, T) float32.
    """
    q, kv, k_rope = q.contiguous(), kv.contiguous(), k_rope.contiguous()
    rows, tokens, heads = q.shape[:3]
    out = q.new_empty(rows, tokens, heads, _value_width(q, kv, k_rope))
    sums = q.new_empty(rows, heads, tokens, dtype=torch.float32)
    _call("attend", q, kv, k_rope, spans, scale, out=out, sums=sums)
    return out, sums


@torch.library.custom_op("nanollm::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor, kv: Tensor, k_rope: Tensor, spans: Tensor | None, scale: float, out: Tensor, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope, given that of the answers (B, T, H, V)."""
    q, kv, k_rope, grad = q.contiguous(), kv.contiguous(), k_rope.contiguous(), grad.contiguous()
    q_grad, kv_grad, k_rope_grad = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(k_rope)
    rows, tokens, heads = q.shape[:3]
    shares = q.new_empty(rows, heads, tokens, k_rope.shape[-1], dtype=torch.float32)
    gradients = {"q_grad": q_grad, "kv_grad": kv_grad, "key_rope_grad": k_rope_grad, "key_rope_shares": shares}
    _call("attend_backward", q, kv, k_rope, spans, scale, out=out, sums=sums, out_grad=grad, **gradients)
    return q_grad, kv_grad, k_rope_grad


def _call(
    name: str, q: Tensor, kv: Tensor, k_rope: Tensor, spans: Tensor | None, scale: float, **others: Tensor
) -> None:
    tensors = {"q": q, "kv": kv, "key_rope": k_rope, **others} | ({} if spans is None else {"spans": spans})
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    rows, tokens, heads = q.shape[:3]
    loaded, rope, value = library(), k_rope.shape[-1], _value_width(q, kv, k_rope)
    assert loaded is not None
    sizes = (rows, tokens, heads, q.shape[-1] - rope, rope, value, torch.get_num_threads())
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    getattr(loaded, name)(byref(Attention(*sizes, scale, **pointers)))


def _value_width(q: Tensor, kv: Tensor, k_rope: Tensor) -> int:
    return kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])


@attend.register_fake
def _(q: Tensor, kv: Tensor, k_rope: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    rows, tokens, heads = q.shape[:3]
    sums = q.new_empty(rows, heads, tokens, dtype=torch.float32)
    return q.new_empty(rows, tokens, heads, _value_width(q, kv, k_rope)), sums


@attend_backward.register_fake
def _(
    q: Tensor, kv: Tensor, k_rope: Tensor, spans: Tensor | None, scale: float, out: Tensor, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, kv, k_rope))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, kv, k_rope, spans, out, sums = ctx.saved_tensors
    return *attend_backward(q, kv, k_rope, spans, ctx.scale, out, sums, grad), None, None


attend.register_autograd(_backward, setup_context=_remember)
