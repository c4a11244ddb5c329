"""Says what a model costs: parameters, cache, arithmetic, memory."""

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from rich.filesize import decimal as size

from nanollm.config import check_at_least, load_config
from nanollm.kernels import attention as fused
from nanollm.model.config import ModelConfig
from nanollm.model.lora import LoraConfig
from nanollm.train.memory import lora_memory, training_memory
from nanollm.world import World

POSITIONAL = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print what a model of this shape costs in parameters, memory and arithmetic, before anything is allocated."""

    model: str
    """A preset's name, such as nano-20m, or a YAML file."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What training and the cache compute in."""
    micro_batch_size: int = 8
    """Sequences per forward pass of the training step whose memory is estimated."""
    recompute: bool = False
    """Activation checkpointing, as in training with --speed.recompute."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter that is trained, as in training with --lora.rank."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "micro_batch_size")


def run(c: Config) -> str:
    facts = describe(c)
    return json.dumps(facts, indent=2) if c.json else table(facts)


def describe(c: Config) -> dict[str, Any]:
    """All facts, as plain numbers with their units in the names."""
    m: ModelConfig = load_config("model", c.model, ModelConfig)
    width: Literal[2, 4] = 4 if c.dtype == "float32" else 2
    predict = partial(training_memory, optimizer="muon") if c.lora.rank is None else partial(lora_memory, lora=c.lora)
    memory = predict(
        m,
        sequences=c.micro_batch_size,
        compute_bytes=width,
        recompute=c.recompute,
        is_fused=fused.fits(*m.head_widths, getattr(torch, c.dtype), World.start().device),
    )
    cache_bytes = m.cache_width * m.n_blocks * width  # of one token
    expanded = m.n_heads * (m.qk_head_dim + m.v_head_dim)
    return {
        "model": asdict(m),
        "parameters": {
            "total": m.total_parameters,
            "active": m.active_parameters,
            "embedding": m.vocab_size * m.d_model,
            "head": m.vocab_size * m.d_model,
        },
        "cache": {
            "numbers_per_token_and_block": m.cache_width,
            "bytes_per_token": cache_bytes,
            "bytes_per_token_if_keys_and_values_were_kept": expanded * m.n_blocks * width,
            "bytes_at_full_context": cache_bytes * m.context_length,
        },
        "flops_per_token": {
            "decode_at_full_context": m.decoding_flops_per_token(m.context_length),
            "training_at_full_context": m.training_flops_per_token(),
        },
        "training_step": {
            "micro_batch_size": c.micro_batch_size,
            "tokens": c.micro_batch_size * m.context_length,
            "dtype": c.dtype,
            "recompute": c.recompute,
            "lora_rank": c.lora.rank,
            "bytes": asdict(memory) | {"total": memory.total},
        },
    }


def table(facts: dict[str, Any]) -> str:
    """The facts that people compare, one per line."""
    parameters, cache, flops = facts["parameters"], facts["cache"], facts["flops_per_token"]
    step, model = facts["training_step"], facts["model"]
    parts = ", ".join(f"{name} {size(count)}" for name, count in step["bytes"].items() if count and name != "total")
    adapter = f", LoRA of rank {step['lora_rank']}" if step["lora_rank"] else ""
    saving = cache["bytes_per_token_if_keys_and_values_were_kept"] / cache["bytes_per_token"]
    rows = {
        "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} active per token",
        "shape": f"{model['n_blocks']} blocks of width {model['d_model']}, {model['n_heads']} heads, "
        f"vocabulary {model['vocab_size']:,}, context {model['context_length']:,}",
        "cache": f"{cache['numbers_per_token_and_block']} numbers per token and block, "
        f"{cache['bytes_per_token']:,} bytes per token ({saving:.1f} times less than keys and values), "
        f"{size(cache['bytes_at_full_context'])} at full context",
        "arithmetic": f"{flops['training_at_full_context'] / 1e9:.3f} GFLOP per trained token, "
        f"{flops['decode_at_full_context'] / 1e9:.3f} GFLOP per decoded token, both at full context",
        "training step": f"about {size(step['bytes']['total'])} for {step['micro_batch_size']} sequences in "
        f"{step['dtype']} with Muon{adapter} ({parts}; gradients come while activations go)",
    }
    return "\n".join(f"{name:<15}{text}" for name, text in rows.items())
