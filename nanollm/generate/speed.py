"""How fast does the engine answer, and how near is that to what the memory of this machine allows?

A decoded token needs every weight once per pass, whatever the number of rows, and every row its own cache: bytes read
over seconds is the bandwidth used, to be compared with what a plain sum over a large array reaches in the same run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.work import Kernels, Quantize
from nanollm.model.transformer import Transformer

READ_BYTES = 512 * 2**20  # far beyond any cache


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


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
    """Rows of one prompt (read once) that are replying, to be stepped at will."""

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
        while len(self.engine.replying) < rows:
            self.engine.step()

    def bytes_read(self, model: Transformer) -> int:
        """What one step reads from memory: the weights that are met, and the cache."""
        c = model.config
        experts = min(c.n_routed_experts, self.rows * c.experts_per_token)  # met in each Mixture of Experts
        met = c.multiplied_parameters + (experts - c.experts_per_token) * c.n_moe_blocks * c.expert_parameters
        runner = self.engine.runner
        return met * runner.weight_bytes + self.rows * self.context * runner.cache_bytes_per_token

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
        "tokens_per_s": asdict(Spread.of([rows / each for _, each in measured])),
        "ms_per_step": asdict(Spread.of([1e3 * each for _, each in measured])),
        "bytes_read_per_step": read,
        "gb_per_s": asdict(Spread.of([read / 1e9 / each for _, each in measured])),
        "memory_gb_per_s": asdict(Spread.of([most for most, _ in measured])),
        "share_of_memory": asdict(Spread.of([read / 1e9 / each / most for most, each in measured])),
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
        "time_to_first_token_s": asdict(Spread.of(times)),
        "tokens_per_s": asdict(Spread.of([prompt_tokens / each for each in times])),
    }


def time_to_first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds from the question to the first token of the answer, in an engine that has nothing else to do."""
    started = time.perf_counter()
    engine.submit(Request(prompt=prompt, max_tokens=1, sampling=SamplingConfig(temperature=0)))
    while not engine.step():
        pass
    return time.perf_counter() - started
