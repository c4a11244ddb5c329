"""Measures inference speed on this machine, beside how fast its memory is."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanollm.bundle import load_bundle
from nanollm.config import check_at_least, load_preset
from nanollm.generate.engine import Engine
from nanollm.generate.request import Kernels, Quantize, Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.world import DeviceName, DtypeName, World

READ_BYTES = 512 * 2**20  # far beyond any cache


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of repeated measurements of one number."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


class Memory:
    """Sums an array of half a gigabyte, once through, to see how fast this machine reads now."""

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.ones(READ_BYTES // 4, device=device)
        self.gb_per_s()  # the first time is slower

    def gb_per_s(self) -> float:
        return READ_BYTES / 1e9 / seconds(lambda: self.numbers.sum().item())  # the item waits for the device


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Decoding:
    """Rows of one prompt (read once) that are decoding, to be stepped at will."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        context: int,
        tokens: int,
        quantize: Quantize = "none",
        kernels: Kernels = "auto",
    ) -> None:
        """After the prompt there are `tokens` steps, around `context` tokens in each row."""
        self.rows, self.context = rows, context
        more = tokens + 2  # the first row, which reads the prompt for all, is one token ahead
        length = min(context + more, model.config.context_length)
        self.engine = Engine(model, rows=rows, length=length, quantize=quantize, kernels=kernels)
        prompt = some_tokens(max(1, length - more), model.config.vocab_size)
        for seed in range(rows):
            self.engine.submit(
                Request(prompt=prompt, max_tokens=more, sampling=SamplingConfig(temperature=1.0), seed=seed)
            )
        while len(self.engine.decoding) < rows:
            self.engine.step()

    def bytes_read(self, model: Transformer) -> int:
        """What one step reads from memory: the weights that are met, and the cache."""
        c = model.config
        experts = min(c.n_routed_experts, self.rows * c.experts_per_token)  # met in each Mixture of Experts
        met = c.multiplied_parameters + (experts - c.experts_per_token) * c.n_moe_blocks * c.expert_parameters
        runner = self.engine.runner
        return round(met * runner.weight_bytes) + self.rows * self.context * runner.cache_bytes_per_token

    def step(self) -> float:
        """Seconds of one step of all rows."""
        return seconds(self.engine.step)


def some_tokens(count: int, vocab_size: int) -> list[int]:
    """Ids that are no sentence: what they are does not matter for speed, except that they differ."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def decoding_speed(
    model: Transformer,
    memory: Memory,
    rows: int,
    *,
    context: int,
    tokens: int,
    repeats: int,
    quantize: Quantize,
    kernels: Kernels,
) -> dict[str, Any]:
    """Tokens/s of all rows together, and the bandwidth that this takes beside what memory gives at that moment."""
    decoding = Decoding(model, rows, context, tokens * repeats + 2, quantize, kernels)
    decoding.step()
    measured = [(memory.gb_per_s(), sum(decoding.step() for _ in range(tokens)) / tokens) for _ in range(repeats)]
    read = decoding.bytes_read(model)
    return {
        "rows": rows,
        "context": context,
        "tokens_per_s": spread([rows / each for _, each in measured]),
        "ms_per_step": spread([1e3 * each for _, each in measured]),
        "bytes_read_per_step": read,
        "gb_per_s": spread([read / 1e9 / each for _, each in measured]),
        "memory_gb_per_s": spread([most for most, _ in measured]),
        "share_of_memory": spread([read / 1e9 / each / most for most, each in measured]),
        "cache_bytes": decoding.engine.cache_bytes,
        "cache_bytes_per_token": decoding.engine.runner.cache_bytes_per_token,
    }


def reading_speed(
    model: Transformer, prompt_tokens: int, *, repeats: int, quantize: Quantize, kernels: Kernels
) -> dict[str, Any]:
    """Time to the first token after a prompt that nobody has read before."""
    engine = Engine(model, rows=1, length=prompt_tokens + 1, quantize=quantize, kernels=kernels)
    times = [
        time_to_first_token(engine, some_tokens(prompt_tokens + number, engine.vocab_size)[number:])
        for number in range(repeats + 1)
    ][1:]
    return {
        "prompt_tokens": prompt_tokens,
        "time_to_first_token_s": spread(times),
        "tokens_per_s": spread([prompt_tokens / each for each in times]),
    }


def time_to_first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds from the question to the first token of the answer, in an engine that has nothing else to do."""
    started = time.perf_counter()
    engine.submit(Request(prompt=prompt, max_tokens=1, sampling=SamplingConfig(temperature=0)))
    while not engine.step():
        pass
    return time.perf_counter() - started


POSITIONAL = ("model",)
REPEATS = 5
"""Of each measurement; median, least and greatest are told."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure time to first token, tokens/s and the memory bandwidth they take, against that of this machine."""

    model: str
    """Folder of a bundle, or the name of a preset such as nano-327m, which gets random weights."""
    rows: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Batch sizes to measure: replies decoded at once."""
    context: int = 512
    """Tokens in the cache of each reply while it is decoded (at most the model's context)."""
    prompt: int = 1500
    """Length in tokens of the prompt whose prefill is timed (at most the model's context less one)."""
    tokens: int = 8
    """Tokens decoded per reply and repetition."""
    quantize: Quantize = "none"
    """int8: one byte per weight, with a scale for each output; int4: four bits, with a scale for every 32 weights."""
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
        check_at_least(1, self, "context", "prompt", "tokens")


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
