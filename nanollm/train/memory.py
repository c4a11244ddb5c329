"""How much memory does a training step take?

Counted from the shapes: weights, gradients, what the optimizers remember, what the forward pass keeps for the backward
pass, and the logits of a chunk. A test holds the kept part to what autograd really keeps, and benchmarks/memory.py the
whole to what a process really takes.
"""

from dataclasses import dataclass
from typing import Literal

from nanollm.model.config import ModelConfig
from nanollm.train.loss import chunk_rows
from nanollm.train.optim import MAX_STACK

IDLE, IDLE_PER_ACTIVATION, IDLE_PER_GRADIENT = 25_000_000, {2: 0.4, 4: 0.06}, 0.25
"""Memory that an allocator holds but cannot hand out, because what was freed lies between what was not; in the smaller
types also their float32 copies that come and go. Fitted to the presets on a CPU (docs/log.md, "Where is the peak of a
step?")."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a step, part by part."""

    weights: int
    optimizer: int
    activations: int
    logits: int
    gradients: int
    idle: int

    @property
    def total(self) -> int:
        """The peak: each block's gradients come while its activations go, so both are never there at once."""
        return self.weights + self.optimizer + max(self.activations + self.logits, self.gradients) + self.idle


def training_memory(
    c: ModelConfig,
    *,
    sequences: int,
    compute_bytes: Literal[2, 4],
    optimizer: Literal["muon", "adamw"],
    recompute: bool = False,
    is_fused: bool = False,
) -> TrainingMemory:
    """Peak of one micro-batch of full-length sequences; compute_bytes is 2 for bfloat16 and float16.

    `recompute` and `is_fused` as in kept_bytes_per_token.
    """
    parameters, tokens = c.total_parameters, sequences * c.context_length
    has_masters = compute_bytes == 2
    head = c.vocab_size * c.d_model
    in_adamw = 2 * head if optimizer == "muon" else parameters  # norms and routers are crumbs
    rows = chunk_rows(c.vocab_size, "cpu")  # GPUs hold chunks four times as large
    # The head's gradient is made from the first chunk on; that of several chunks is added up in float32.
    head_gradient = head * (compute_bytes + (4 if has_masters and tokens > rows else 0))
    in_backward = 4 * compute_bytes * max(c.d_ff, (c.n_shared_experts + c.experts_per_token) * c.d_expert)
    activations = tokens * (kept_bytes_per_token(c, compute_bytes, recompute, is_fused) + in_backward)
    # Muon turns a stack of gradients into directions: float32 twice, and three times in the compute type.
    stack = min(parameters - in_adamw, MAX_STACK) * (8 + 3 * compute_bytes)
    return TrainingMemory(
        weights=parameters * (4 + (2 if has_masters else 0)),
        optimizer=8 * in_adamw + 4 * (parameters - in_adamw),
        activations=activations,
        logits=min(tokens, rows) * c.vocab_size * compute_bytes + head_gradient,
        gradients=4 * parameters + stack,
        idle=IDLE + round(IDLE_PER_ACTIVATION[compute_bytes] * activations + IDLE_PER_GRADIENT * 4 * parameters),
    )


def kept_bytes_per_token(
    c: ModelConfig, compute_bytes: Literal[2, 4], recompute: bool = False, is_fused: bool = False
) -> int:
    """What the trunk keeps of one token from the forward to the backward pass.

    With `recompute` that is what enters each block, and all of the block whose turn it is. `is_fused`: attention.cpp
    serves, so the keys of every head are never written out.
    """
    attention = 2 * c.d_model + 2 * c.q_lora_rank + c.cache_width + c.kv_lora_rank  # what norms and matrices are given
    attention += c.n_heads * c.qk_head_dim * (1 if is_fused else 2)  # queries and keys
    attention += c.n_heads * (c.qk_nope_head_dim + 2 * c.v_head_dim)  # expanded latents, answers
    attention += c.qk_rope_head_dim if is_fused else 0
    floats = c.n_heads + 4  # a sum of exponentials per head, a factor per norm
    experts = 2 * (c.n_shared_experts + c.experts_per_token) * c.d_expert
    gathered = 2 * c.experts_per_token * c.d_model  # tokens gathered, answers to be weighted
    router = c.d_model if compute_bytes == 2 else 0  # float32 copy of the tokens
    ffn = 2 * c.d_model
    dense = (attention + ffn + 2 * c.d_ff) * compute_bytes + 4 * floats
    moe = (attention + ffn + experts + gathered) * compute_bytes + 4 * (floats + router)
    last_norm = c.d_model * compute_bytes + 4
    if recompute:
        return c.n_blocks * c.d_model * compute_bytes + max(dense, moe) + last_norm
    return (c.n_blocks - c.n_moe_blocks) * dense + c.n_moe_blocks * moe + last_norm
