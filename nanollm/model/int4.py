"""Four bits per weight, as in llama.cpp's q4_0: a scale d for 32 neighbouring inputs, and numbers d * (0..15 - 8).

d is the number of greatest magnitude / -8 in float16 (gguf.quants.Q4_0, bit for bit). Latents' matrices and the router
are not int4: little of a model, and all of it passes through them.

A model can learn to be rounded so (quantization-aware training, arXiv:1712.05877, with the straight-through estimator
of arXiv:1308.3432): the forward pass sees its weights rounded, and their gradients move the weights themselves.
Letters: O outputs, I inputs, G groups of 32 inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanollm.model.config import ModelConfig

GROUP = 32
SMALLEST = 2.0**-19  # of five bits, and half of it too, in float16
WIDE = ("q_a_proj.weight", "kv_a_proj.weight", "kv_b_proj.weight", "centroids")


def check_widths(c: ModelConfig) -> None:
    """ValueError unless the inputs of every matrix come in whole groups."""
    names = ("d_model", "q_lora_rank", "d_ff", "d_expert")
    widths = {name: getattr(c, name) for name in names} | {"n_heads x v_head_dim": c.n_heads * c.v_head_dim}
    if odd := [f"{name} is {width}" for name, width in widths.items() if width % GROUP]:
        raise ValueError(f"int4 needs widths that {GROUP} divides, but {', '.join(odd)}; int8 takes any even width")


def is_int4(name: str, weight: Tensor) -> bool:
    """Whether a parameter of the model has four bits."""
    return weight.dim() > 1 and not name.endswith(WIDE)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., O, I) to numbers from 0 to 15, uint8 of the same shape, and scales (..., O, G) in float16."""
    groups, scales = with_scales(weight)
    return numbers(groups, scales).to(torch.uint8).flatten(-2), scales[..., 0].half()


def rounded(name: str, weight: Tensor) -> Tensor:
    """A parameter as int4 training has it, in float32. Rounding it again, to q4_0, q5_0, bfloat16 or float16, changes
    nothing: scales have five bits here, so that their products with 4-bit numbers fit into the eight of bfloat16, and
    those that float16 would round are 0."""
    if weight.dim() == 1:
        return weight.float()
    if not is_int4(name, weight):
        return weight.bfloat16().half().float()
    groups, scales = with_scales(weight)
    mantissa, exponent = torch.frexp(scales)
    scales = torch.where(scales.abs() < SMALLEST, 0, torch.ldexp((mantissa * 32).round() / 32, exponent))
    return ((numbers(groups, scales) - 8) * scales).flatten(-2)


def was_trained_for_it(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights, by the names of Transformer's state_dict, are already as `rounded` leaves them."""
    return all(
        weight.shape[-1] % GROUP == 0 and torch.equal(rounded(name, weight), weight)
        for name, weight in weights.items()
        if is_int4(name, weight)
    )


def numbers(groups: Tensor, scales: Tensor) -> Tensor:
    """0 to 15, float32, of groups (..., O, G, 32) and scales (..., O, G, 1)."""
    return (groups * torch.where(scales == 0, 0, 1 / scales) + 8.5).floor().clamp(0, 15)


def with_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (..., O, G, 32) and scales (..., O, G, 1), both float32."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    return groups, groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
