"""Four bits per weight, as in llama.cpp's q4_0: a scale d for 32 neighbouring inputs, and numbers d * (0..15 - 8).

d is the number of greatest magnitude / -8 in float16 (gguf.quants.Q4_0, bit for bit). Latents' matrices and the router
stay as they are: little of a model, and all of it passes through them.
Letters: O outputs, I inputs, G groups of 32 inputs.
"""

import torch
from torch import Tensor

from nanollm.model.config import ModelConfig

GROUP = 32
WIDE = ("q_a_proj.weight", "kv_a_proj.weight", "kv_b_proj.weight", "centroids")


def check_widths(c: ModelConfig) -> None:
    """ValueError unless the inputs of every matrix come in whole groups."""
    names = ("d_model", "q_lora_rank", "d_ff", "d_expert")
    widths = {name: getattr(c, name) for name in names} | {"n_heads x v_head_dim": c.n_heads * c.v_head_dim}
    if odd := [f"{name} is {width}" for name, width in widths.items() if width % GROUP]:
        raise ValueError(f"int4 needs widths that {GROUP} divides, and {', '.join(odd)}; int8 takes any even width")


def is_int4(name: str, weight: Tensor) -> bool:
    """Whether a parameter of the model has four bits."""
    return weight.dim() > 1 and not name.endswith(WIDE)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., O, I) to numbers from 0 to 15, uint8 of the same shape, and scales (..., O, G) in float16."""
    groups, scales = with_scales(weight)
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (groups * inverse + 8.5).floor().clamp(0, 15).to(torch.uint8).flatten(-2), scales[..., 0].half()


def with_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (..., O, G, 32) and scales (..., O, G, 1), both float32."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    return groups, groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
