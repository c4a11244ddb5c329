"""Writes narrow latent attention in the width that every kernel of vLLM's knows, with the same results, and back.

vLLM's kernels of latent attention know latents of 512 with rotary keys of 64, DeepSeek-V3's own (those for GPUs partly
256 with 64 too). A narrower model is filled up such that nothing is rounded, in any type:

latent          repeated, not filled with zeros: its mean square, and so its RMSNorm, stays the same with the same
                epsilon. Behind the norm, whose weight ends in zeros, only the first copy is left.
rotary pairs    pair i of width R turns as pair i * 64/R of width 64 does; the pairs between are zeros.
queries         engines divide scores by sqrt(nope + rotary). Zeros are added until that root is a power of two times
                the old one, and the queries are multiplied by that power.

Letters: D model width, H heads, Q query latent, C key-value latent, N width without position, R rotary, V value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.model.config import ModelConfig

Widen = Literal["auto", "off"]
VLLM_WIDTHS = (320, 576)
"""Of latent and rotary key together (get_supported_head_sizes in vLLM's mla_attention.py)."""
WIDE_LATENT, WIDE_ROTARY = 512, 64

Weights = Mapping[str, Tensor]  # by the names of Transformer's state_dict


def widened_shape(c: ModelConfig) -> ModelConfig:
    """The shape that vLLM has kernels for: c itself if it is one. ValueError if nothing without rounding is."""
    if c.cache_width in VLLM_WIDTHS:
        return c
    if WIDE_LATENT % c.kv_lora_rank or WIDE_ROTARY % c.qk_rope_head_dim:
        raise ValueError(
            f"vLLM needs a latent of {WIDE_LATENT} with a rotary width of {WIDE_ROTARY}; kv_lora_rank {c.kv_lora_rank} "
            f"and qk_rope_head_dim {c.qk_rope_head_dim} must divide them; --widen off writes the model as it is"
        )
    head = c.qk_head_dim
    while head < c.qk_nope_head_dim + WIDE_ROTARY:
        head *= 4
    return replace(c, kv_lora_rank=WIDE_LATENT, qk_nope_head_dim=head - WIDE_ROTARY, qk_rope_head_dim=WIDE_ROTARY)


def to_wide(weights: Weights, c: ModelConfig, wide: ModelConfig) -> dict[str, Tensor]:
    """The weights of c as those of its widened shape; what they compute is the same, up to the order of sums."""
    widened, rows = dict(weights), places(c, wide)
    for prefix in attentions(c) if wide != c else ():
        for name, (size, index) in rows.items():
            tensor = weights[prefix + name]
            widened[prefix + name] = tensor.new_zeros(size, *tensor.shape[1:]).index_copy_(0, index, tensor)
        widened[prefix + "q_b_proj.weight"] *= factor(c, wide)
        latent = weights[prefix + "kv_a_proj.weight"][: c.kv_lora_rank]
        widened[prefix + "kv_a_proj.weight"][:WIDE_LATENT] = latent.repeat(WIDE_LATENT // c.kv_lora_rank, 1)
        name = prefix + "kv_b_proj.weight"
        widened[name] = F.pad(widened[name], (0, WIDE_LATENT - c.kv_lora_rank))
    return widened


def to_narrow(weights: Weights, c: ModelConfig, wide: ModelConfig) -> dict[str, Tensor]:
    """The weights of c from those of `wide`; ValueError if `to_wide` did not make them."""
    narrowed, rows = dict(weights), places(c, wide)
    for prefix in attentions(c):
        for name, (_, index) in rows.items():
            narrowed[prefix + name] = weights[prefix + name].index_select(0, index)
        narrowed[prefix + "q_b_proj.weight"] /= factor(c, wide)
        name = prefix + "kv_b_proj.weight"
        narrowed[name] = narrowed[name][:, : c.kv_lora_rank].contiguous()
    again = to_wide(narrowed, c, wide)
    changed = [name for name, tensor in weights.items() if not torch.equal(again[name], tensor)]
    if changed:
        raise ValueError(f"{changed[0]} is not what an export of narrow attention writes; it was changed since")
    return narrowed


def attentions(c: ModelConfig) -> Iterator[str]:
    """What the names of each block's attention begin with."""
    return (f"trunk.blocks.{block}.attention." for block in range(c.n_blocks))


def factor(c: ModelConfig, wide: ModelConfig) -> float:
    """What the queries are multiplied by, a power of two: wide heads are divided by so much more."""
    return (wide.qk_head_dim / c.qk_head_dim) ** 0.5


def places(c: ModelConfig, wide: ModelConfig) -> dict[str, tuple[int, Tensor]]:
    """Of each tensor that grows: its rows afterwards, and where those of before go."""
    pairs = torch.arange(wide.qk_rope_head_dim).unflatten(0, (c.qk_rope_head_dim // 2, -1, 2))[:, 0].flatten()  # (R,)
    nope, latent = torch.arange(c.qk_nope_head_dim), torch.arange(c.kv_lora_rank)
    heads = torch.arange(c.n_heads)[:, None]
    query = torch.cat((nope, wide.qk_nope_head_dim + pairs))  # (N + R,)
    key_value = torch.cat((nope, wide.qk_nope_head_dim + torch.arange(c.v_head_dim)))  # (N + V,)
    per_head = wide.qk_nope_head_dim + c.v_head_dim
    return {
        "q_b_proj.weight": (c.n_heads * wide.qk_head_dim, (heads * wide.qk_head_dim + query).flatten()),
        "kv_a_proj.weight": (wide.cache_width, torch.cat((latent, wide.kv_lora_rank + pairs))),
        "kv_a_norm.weight": (wide.kv_lora_rank, latent),
        "kv_b_proj.weight": (c.n_heads * per_head, (heads * per_head + key_value).flatten()),
    }
