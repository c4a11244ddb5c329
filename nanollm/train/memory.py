"""How much memory does a training step take?

Counted from the shapes: weights, gradients, what the optimizers remember, what the forward pass keeps for the backward
pass, and the logits. A test holds the kept part to what autograd really keeps.
"""

from dataclasses import dataclass
from typing import Literal

from nanollm.model.config import ModelConfig
from nanollm.train.loss import MAX_LOGITS


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes at the peak of a step, part by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(
    c: ModelConfig, *, sequences: int, compute_bytes: Literal[2, 4], optimizer: Literal["muon", "adamw"]
) -> TrainingMemory:
    """Peak of one micro-batch of full-length sequences; compute_bytes is 2 for bfloat16 and float16."""
    parameters, tokens = c.total_parameters, sequences * c.context_length
    has_masters = compute_bytes == 2
    in_adamw = 2 * c.vocab_size * c.d_model if optimizer == "muon" else parameters  # norms and routers are crumbs
    chunk = min(tokens, max(1, MAX_LOGITS // c.vocab_size))
    return TrainingMemory(
        weights=parameters * (4 + (2 if has_masters else 0)),
        gradients=parameters * (4 + (2 if has_masters else 0)),
        optimizer=8 * in_adamw + 4 * (parameters - in_adamw),
        activations=tokens * kept_bytes_per_token(c, compute_bytes),
        # Log-probabilities and their gradient in float32, logits and their gradient in the compute type.
        logits=chunk * c.vocab_size * (8 + 2 * compute_bytes),
    )


def kept_bytes_per_token(c: ModelConfig, compute_bytes: Literal[2, 4]) -> int:
    """What the trunk keeps of one token from the forward to the backward pass."""
    latents = c.q_lora_rank + c.kv_lora_rank
    norms = 2 * (2 * c.d_model + latents)  # float32: the input and the normalised input of each norm
    attention = 2 * c.d_model + latents  # inputs of the linear layers
    attention += 2 * c.n_heads * c.qk_head_dim  # queries and keys
    attention += c.n_heads * (c.qk_nope_head_dim + 2 * c.v_head_dim)  # expanded latents, answers
    dense = 4 * c.d_ff  # gate, its silu, up, their product
    experts = 4 * (c.n_shared_experts + c.experts_per_token) * c.d_expert
    moe = experts + 2 * c.experts_per_token * c.d_model  # tokens gathered, answers to be weighted
    router = c.d_model if compute_bytes == 2 else 0  # float32 copy of the tokens
    narrow = c.n_blocks * attention + (c.n_blocks - c.n_moe_blocks) * dense + c.n_moe_blocks * moe + c.d_model
    wide = c.n_blocks * (norms + c.n_heads) + c.n_moe_blocks * router + 2 * c.d_model
    return narrow * compute_bytes + wide * 4
