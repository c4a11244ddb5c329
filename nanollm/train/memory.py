"""Estimates the memory of a training step.

Counted from the shapes: weights, gradients, what the optimizers remember, what the forward pass keeps for the backward
pass, and the logits of a chunk. A test holds the kept part to what autograd really keeps, and benchmarks/memory.py the
whole to what a process really takes.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig, targeted
from nanollm.model.transformer import Transformer
from nanollm.train.loss import chunk_rows
from nanollm.train.optim import MAX_STACK

IDLE, IDLE_PER_ACTIVATION, IDLE_PER_GRADIENT = 25_000_000, {2: 0.4, 4: 0.06}, 0.25
"""Memory that an allocator holds but cannot hand out, because what was freed lies between what was not; in the smaller
types also their float32 copies that come and go. Fitted to the presets on a CPU (docs/log.md, "Where is the peak of a
step?")."""
IDLE_IF_ACCUMULATING = 2
"""Times as much for each activation where gradients of earlier micro-batches lie between them; fitted to nano-5m."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a step, part by part."""

    weights: int
    optimizer: int
    activations: int
    logits: int
    gradients: int
    idle: int
    kept_gradients: int = 0  # those of the micro-batches before, which stay while this one's activations come
    sums: int = 0  # of weights and their adapters, from the forward to the backward pass

    @property
    def total(self) -> int:
        """The peak: each block's gradients come while its activations go, so both are never there at once."""
        passing = max(self.activations + self.sums + self.logits + self.kept_gradients, self.gradients)
        return self.weights + self.optimizer + passing + self.idle


def training_memory(
    c: ModelConfig,
    *,
    sequences: int,
    compute_bytes: Literal[2, 4],
    optimizer: Literal["muon", "adamw"],
    recompute: bool = False,
    is_fused: bool = False,
    accumulates: bool = False,
    on_gpu: bool = False,
    parts: int = 1,
) -> TrainingMemory:
    """Peak of one micro-batch of full-length sequences; compute_bytes is 2 for bfloat16 and float16.

    `recompute` and `is_fused` as in kept_bytes_per_token. `accumulates`: a step has several micro-batches. `on_gpu`:
    blocks and loss are compiled, and what the allocator holds beside what is used is not counted, as PyTorch's own
    count of a GPU does not. `parts`: processes that hold one copy of the model together (fsdp, hsdp).
    """
    parameters, tokens = c.total_parameters, sequences * c.context_length
    has_masters = compute_bytes == 2
    head = c.vocab_size * c.d_model
    in_adamw = 2 * head if optimizer == "muon" else parameters  # norms and routers are crumbs
    rows = chunk_rows(c.vocab_size, "cuda" if on_gpu else "cpu")
    # The head's gradient is made from the first chunk on; that of several chunks is added up in float32.
    head_gradient = head * (compute_bytes + (4 if has_masters and tokens > rows else 0))
    in_backward = 4 * compute_bytes * max(c.d_ff, (c.n_shared_experts + c.experts_per_token) * c.d_expert)
    activations = tokens * (kept_bytes_per_token(c, compute_bytes, recompute, is_fused, on_gpu) + in_backward)
    # Muon turns a stack of gradients into directions: float32 twice, and three times in the compute type.
    stack = min(parameters - in_adamw, MAX_STACK) * (8 + 3 * compute_bytes)
    per_activation = IDLE_PER_ACTIVATION[compute_bytes] * (IDLE_IF_ACCUMULATING if accumulates else 1)
    idle = IDLE + round(per_activation * activations + IDLE_PER_GRADIENT * 4 * parameters)
    seen = compute_bytes * parameters if has_masters or parts > 1 else 0  # in parts it is whole block by block: at most
    return TrainingMemory(
        weights=4 * parameters // parts + seen,
        optimizer=(8 * in_adamw + 4 * (parameters - in_adamw)) // parts,
        activations=activations,
        logits=min(tokens, rows) * c.vocab_size * compute_bytes + head_gradient,
        gradients=4 * parameters // (1 if accumulates else parts) + stack,
        idle=0 if on_gpu else idle,
        kept_gradients=4 * parameters if accumulates else 0,  # FSDP2 adds them up before it cuts them
    )


def lora_memory(
    c: ModelConfig,
    lora: LoraConfig,
    *,
    sequences: int,
    compute_bytes: Literal[2, 4],
    recompute: bool = False,
    is_fused: bool = False,
) -> TrainingMemory:
    """The same where an adapter is trained, in one process on a CPU: the model is there once, in the compute type."""
    assert lora.rank is not None
    with torch.device("meta"):
        model = Transformer(c)
    shapes = {name: model.get_parameter(name).shape for name in targeted(model, lora.targets)}
    adapter = sum(lora.rank * (shape.numel() // shape[-1] + shape.numel() // shape[-2]) for shape in shapes.values())
    sums = Counter[str]()
    for name, shape in shapes.items():
        sums[name.partition("blocks.")[2].partition(".")[0]] += shape.numel()  # block by block
    full = training_memory(
        c,
        sequences=sequences,
        compute_bytes=compute_bytes,
        optimizer="muon",
        recompute=recompute,
        is_fused=is_fused,
    )
    return TrainingMemory(
        weights=compute_bytes * c.total_parameters + (4 + compute_bytes * (compute_bytes == 2)) * adapter,
        optimizer=4 * adapter,
        activations=full.activations,
        sums=compute_bytes * (max(sums.values()) if recompute else sums.total()),
        logits=min(sequences * c.context_length, chunk_rows(c.vocab_size, "cpu")) * c.vocab_size * compute_bytes,
        gradients=4 * adapter,
        idle=full.idle,
    )


def kept_bytes_per_token(
    c: ModelConfig,
    compute_bytes: Literal[2, 4],
    recompute: bool = False,
    is_fused: bool = False,
    is_compiled: bool = False,
) -> int:
    """What the trunk keeps of one token from the forward to the backward pass.

    With `recompute` that is what enters each block, and all of the block whose turn it is. `is_fused`: attention.cpp
    serves, so the keys of every head are never written out. `is_compiled`: torch.compile keeps what enters each gated
    network's last product, too.
    """
    attention = 2 * c.d_model + 2 * c.q_lora_rank + c.cache_width + c.kv_lora_rank  # what norms and matrices are given
    attention += c.n_heads * c.qk_head_dim * (1 if is_fused else 2)  # queries and keys
    attention += c.n_heads * (c.qk_nope_head_dim + 2 * c.v_head_dim)  # expanded latents, answers
    attention += c.qk_rope_head_dim if is_fused else 0
    floats = c.n_heads + 4  # a sum of exponentials per head, a factor per norm
    widths = 3 if is_compiled else 2  # of a gated network
    experts = widths * (c.n_shared_experts + c.experts_per_token) * c.d_expert
    gathered = 2 * c.experts_per_token * c.d_model  # tokens gathered, answers to be weighted
    router = c.d_model if compute_bytes == 2 else 0  # float32 copy of the tokens
    ffn = 2 * c.d_model
    dense = (attention + ffn + widths * c.d_ff) * compute_bytes + 4 * floats
    moe = (attention + ffn + experts + gathered) * compute_bytes + 4 * (floats + router)
    last_norm = c.d_model * compute_bytes + 4
    if recompute:
        return c.n_blocks * c.d_model * compute_bytes + max(dense, moe) + last_norm
    return (c.n_blocks - c.n_moe_blocks) * dense + c.n_moe_blocks * moe + last_norm


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of the GPU's memory or else of the machine's; None: nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    status = Path("/proc/self/status")  # on Linux getrusage begins with the size of the process that started this one
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
