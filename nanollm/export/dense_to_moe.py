"""Writes dense blocks among Mixtures of Experts as Mixtures of Experts that compute the same, and back.

DeepSeek-V3, vLLM, SGLang and llama.cpp know one pattern: some dense blocks first, then Mixtures of Experts only. So
each later dense SwiGLU is written as a Mixture of Experts that computes the same sum. Its channels (a row of gate_proj
and of up_proj, a column of down_proj) go into the shared expert; missing ones are zeros, and so are the routed experts.

If the shared expert is too narrow, the rest goes into the first routed experts, where possible at no cost in arithmetic
(DeepSeek-V3's own rule d_ff = d_expert * (shared + active)). Centroids of zero give every expert the score 0.5, a bias
of 2 makes the router choose these, and their down_proj is divided by the weight that the router gives them: a half, a
quarter, ..., so nothing is rounded. Where it is none of these, the shared expert is widened instead.

Letters: D model width, F dense hidden width, E routed experts, W their width, S shared width, K experts per token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, frexp
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.export.widen import Widen, widened_shape
from nanollm.model.config import ModelConfig

Format = Literal["compact", "deepseek-v3", "gguf", "web"]
Dtype = Literal["f32", "bf16", "f16", "q8_0"]
STORED: dict[torch.dtype, Dtype] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""As which type an export keeps numbers of a type without a change."""

CHOSEN = 2.0  # a selection bias that the others' score of 0.5 cannot reach
CHANNELS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}  # their dimension in the matrices of a SwiGLU

Weights = Mapping[str, Tensor]  # by the names of Transformer's state_dict


@dataclass(frozen=True)
class Placement:
    """A model and the same model with Mixtures of Experts only, after some dense blocks."""

    before: ModelConfig
    after: ModelConfig
    splits: bool = False  # whether the first experts_per_token routed experts take channels too

    @classmethod
    def of(cls, c: ModelConfig) -> "Placement":
        """The cheapest one."""
        first = c.n_dense_before_moe
        if all(c.is_moe(block) for block in range(first, c.n_blocks)):
            return cls(c, c)
        after = replace(c, moe_every=1, n_dense_first=first)
        shared = c.n_shared_experts * c.d_expert
        if c.d_ff <= shared:
            return cls(c, after)
        is_exact = answer_weight(c) <= 1 and frexp(answer_weight(c))[0] == 0.5
        if c.d_ff <= shared + c.experts_per_token * c.d_expert and is_exact:
            return cls(c, after, splits=True)
        return cls(c, replace(after, n_shared_experts=ceil(c.d_ff / c.d_expert)))

    @property
    def kept(self) -> int:
        """Channels of a dense block that its shared expert takes."""
        return min(self.before.d_ff, self.after.n_shared_experts * self.after.d_expert)

    def blocks(self) -> Iterator[tuple[str, bool]]:
        """For each block with a Mixture of Experts afterwards: the prefix of its names, and whether it had one."""
        for block in range(self.after.n_blocks):
            if self.after != self.before and self.after.is_moe(block):
                yield f"trunk.blocks.{block}.ffn.", self.before.is_moe(block)


def exported_shape(config: ModelConfig, form: Format, widen: Widen = "auto") -> ModelConfig:
    """The shape of the model as a format has it: compact alone knows dense blocks everywhere, deepseek-v3 is widened.

    ValueError for attention that cannot be widened.
    """
    if form == "compact":
        return config
    if form == "deepseek-v3" and widen == "auto":
        config = widened_shape(config)
    return Placement.of(config).after


def answer_weight(c: ModelConfig) -> float:
    """What the router gives each of K chosen experts if all scores are 0.5."""
    return c.routed_scaling_factor * (1 / c.experts_per_token if c.norm_topk_prob else 0.5)


def dense_to_moe(weights: Weights, p: Placement) -> dict[str, Tensor]:
    """The weights of p.before as those of p.after: what they compute is the same, up to the order of sums."""
    placed = dict(weights)
    for prefix, was_moe in p.blocks():
        for name in CHANNELS:
            matrix = placed.pop(f"{prefix}shared.{name}.weight" if was_moe else f"{prefix}{name}.weight")
            shared, experts = split(matrix, p, name)
            placed[f"{prefix}shared.{name}.weight"] = shared
            if not was_moe:
                placed[f"{prefix}experts.{name}"] = experts
        if not was_moe:
            placed[f"{prefix}centroids"] = matrix.new_zeros(p.after.n_routed_experts, p.after.d_model)
            bias = torch.zeros(p.after.n_routed_experts)
            bias[: p.after.experts_per_token] = CHOSEN if p.splits else 0.0
            placed[f"{prefix}balance_bias"] = bias
    return placed


def pairs_to_moe(pairs: Mapping[str, tuple[Tensor, Tensor]], p: Placement) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank pairs, A (R, N) and B (M, R) of the matrix called so in p.before, as those of the matrices of p.after.

    Of gate_proj and up_proj the channels lie in B, of down_proj in A: they are placed as those of the matrix are, and
    the other half of the pair serves the shared expert and each routed one. Experts of zeros get no pair.
    """
    placed = dict(pairs)
    for prefix, was_moe in p.blocks():
        for name, dim in CHANNELS.items():
            a, b = placed.pop(f"{prefix}shared.{name}.weight" if was_moe else f"{prefix}{name}.weight", (None, None))
            if a is None or b is None:
                continue
            shared, experts = split((b, a)[dim], p, name)
            placed[f"{prefix}shared.{name}.weight"] = (a, shared) if dim == 0 else (shared, b)
            if p.splits and not was_moe:
                every = (a, b)[dim].expand(len(experts), -1, -1)
                placed[f"{prefix}experts.{name}"] = (every, experts) if dim == 0 else (experts, every)
    return placed


def split(matrix: Tensor, p: Placement, name: str) -> tuple[Tensor, Tensor]:
    """Channels of a SwiGLU's matrix: those of the shared expert, (S, D) or (D, S), and those of routed ones."""
    dim, width = CHANNELS[name], p.after.n_shared_experts * p.after.d_expert
    kept, rest = matrix.tensor_split([width], dim)
    return padded(kept, width, dim), as_experts(rest, p, name)


def as_experts(rest: Tensor, p: Placement, name: str) -> Tensor:
    """The channels that the shared expert does not take, as matrices of routed experts: (E, W, D), or (E, D, W)."""
    experts, width, dim = p.after.n_routed_experts, p.after.d_expert, CHANNELS[name]
    apart = padded(rest, experts * width, dim).unflatten(dim, (experts, width))
    return apart if dim == 0 else apart.transpose(0, 1) / answer_weight(p.after)


def padded(matrix: Tensor, width: int, dim: int) -> Tensor:
    """The matrix with zeros behind its channels, up to `width` of them."""
    missing = width - matrix.shape[dim]
    return F.pad(matrix, (0, 0, 0, missing) if dim == 0 else (0, missing))


def moe_to_dense(weights: Weights, p: Placement) -> dict[str, Tensor]:
    """The weights of p.before from those of p.after; ValueError if `dense_to_moe` did not make them."""
    taken = dict(weights)
    for prefix, was_moe in p.blocks():
        for name, dim in CHANNELS.items():
            matrix = taken.pop(f"{prefix}shared.{name}.weight")
            if was_moe:
                width = p.before.n_shared_experts * p.before.d_expert
                taken[f"{prefix}shared.{name}.weight"] = matrix.narrow(dim, 0, width)
                continue
            experts = taken.pop(f"{prefix}experts.{name}")
            if dim == 1:
                experts = experts.transpose(0, 1) * answer_weight(p.after)
            rest = experts.flatten(dim, dim + 1).narrow(dim, 0, p.before.d_ff - p.kept)
            taken[f"{prefix}{name}.weight"] = torch.cat((matrix.narrow(dim, 0, p.kept), rest), dim)
        if not was_moe:
            del taken[f"{prefix}centroids"], taken[f"{prefix}balance_bias"]
    again = dense_to_moe(taken, p)
    changed = [name for name, tensor in weights.items() if not torch.equal(again[name], tensor)]
    if changed:
        raise ValueError(f"{changed[0]} is not what an export of dense blocks writes; it was changed since")
    return taken
