"""How fast does a model answer on this machine?"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanollm.bundle import load_bundle
from nanollm.generate.speed import Memory, decoding_speed, reading_speed
from nanollm.generate.work import Kernels, Quantize
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.settings import load_preset, preset_names
from nanollm.world import DeviceName, DtypeName, World

POSITIONAL = ("model",)
REPEATS = 5
"""Of each measurement; median, least and greatest are told."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure time to first token, tokens/s and the memory bandwidth they take, against that of this machine."""

    model: str
    """Folder of a bundle, or the name of a preset such as nano-327m, which gets random weights."""
    rows: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Replies that are decoded at once; each number is measured."""
    context: int = 512
    """Tokens before and in each reply while it is decoded (cut to the model's context)."""
    prompt: int = 1500
    """Tokens of the prompt whose reading is timed (cut to the model's context less one)."""
    tokens: int = 8
    """Tokens per row and repetition."""
    quantize: Quantize = "none"
    """int8: weights in one byte each, with a scale per output."""
    kernels: Kernels = "auto"
    """native: the compiled forward pass for CPUs; torch: the model's own operations."""
    json: bool = False
    """Print JSON instead of a table."""
    device: DeviceName = "auto"
    """Where to compute."""
    dtype: DtypeName = "auto"
    """What to compute in."""

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"rows must be numbers of at least 1, got {self.rows}")
        for name in ("context", "prompt", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(c: Config) -> str:
    facts = measure(c)
    return json.dumps(facts, indent=2) if c.json else table(facts)


def measure(c: Config) -> dict[str, Any]:
    """All measurements, as plain numbers with their units in the names."""
    world = World.start(c.device, c.dtype)
    model = open_model(c.model, world)
    limit = model.config.context_length
    steps = c.tokens * REPEATS + 4
    if steps >= limit:
        raise ValueError(f"tokens x repeats must stay below the context of {limit}, got {c.tokens} x {REPEATS}")
    how: dict[str, Any] = {"repeats": REPEATS, "quantize": c.quantize, "kernels": c.kernels}
    memory, context = Memory(world.device), min(c.context, limit)
    return {
        "model": c.model,
        **world.names,
        "quantize": c.quantize,
        "decode": [decoding_speed(model, memory, rows, context=context, tokens=c.tokens, **how) for rows in c.rows],
        "prefill": reading_speed(model, min(c.prompt, limit - 1), **how),
    }


def open_model(name: str, world: World) -> Transformer:
    """The model of a bundle, or one of a preset's shape."""
    if Path(name).exists():
        return load_bundle(name, world.dtype, world.device).model
    if name not in preset_names("model"):
        raise ValueError(f"{name} is neither a folder nor a preset; presets: {', '.join(preset_names('model'))}")
    return Transformer(ModelConfig(**load_preset("model", name))).init(0).to(world.device, world.dtype)


def table(facts: dict[str, Any]) -> str:
    """One line per measurement: median, and in brackets the least and the greatest."""
    lines = [f"{facts['model']}, {facts['device']}, {facts['dtype']}, quantize {facts['quantize']}"]
    for decode in facts["decode"]:
        speed, used, share = decode["tokens_per_s"], decode["gb_per_s"]["median"], decode["share_of_memory"]["median"]
        name = f"decode, {decode['rows']} x {decode['context']}"
        lines.append(
            f"{name:<24}{speed['median']:8.1f} tokens/s ({speed['least']:.1f} to {speed['greatest']:.1f}), reads "
            f"{used:.1f} GB/s, {share:.0%} of what memory gives"
        )
    first, read = facts["prefill"]["time_to_first_token_s"], facts["prefill"]["tokens_per_s"]
    name = f"prompt of {facts['prefill']['prompt_tokens']:,}"
    lines.append(f"{name:<24}{read['median']:8.1f} tokens/s, first token after {first['median']:.3f} s")
    lines.append(f"{'cache':<24}{facts['decode'][0]['cache_bytes_per_token']:8,} bytes per token")
    return "\n".join(lines)
