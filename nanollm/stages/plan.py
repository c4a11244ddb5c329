"""What training fits on which hardware, how long it takes and what it costs, before anything is rented.

Memory is counted from the shapes (train/memory.py). Time is model FLOPs, 6 per weight and token and those of attention,
divided by a share of the hardware's peak: the model FLOPs utilisation (MFU; PaLM, arXiv:2204.02311, appendix B) that
training of a model of about that size was measured to reach.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.filesize import decimal as size

from nanollm import hardware
from nanollm.config import load_config, load_preset
from nanollm.hardware import GPUS, GPUS_PER_HOST, TERA, Hardware
from nanollm.kernels import attention as fused
from nanollm.model.config import ModelConfig
from nanollm.progress import duration, say
from nanollm.train.memory import TrainingMemory, training_memory
from nanollm.train.scaling import LEVEL, Ladder, tokens_per_step
from nanollm.world import World

POSITIONAL = ("model",)

TOKENS_PER_PARAMETER = 20
VALIDATION_TOKENS = 2**16

MFU = {
    "cpu": {"nano-1m": 0.28, "nano-5m": 0.40, "nano-20m": 0.52, "nano-60m": 0.46, "nano-327m": 0.50},
    "cuda": {"nano-327m": 0.375},
}
"""Of a measured matrix product on two cores of an AMD EPYC (nano-20m: 1,926 tokens/s of 435 GFLOP/s); of the data sheet
on one H200 (188,800 tokens/s with Muon). docs/planning.md has the measurements."""
PRODUCT_SHARE = 735 / 989.4
"""What an H200's best product of these shapes reached of its data sheet: what is measured here is a product, too."""

MAX_MICRO_BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}
"""Larger micro-batches were not measured, and take memory for little speed."""
RESERVED = {"cpu": 0.1, "cuda": 0.05}
"""Share of the memory left to the system, or held by a GPU's allocator in pieces too small to use. A rule of thumb."""
LIBRARIES = {"cpu": 390_000_000, "cuda": 600_000_000}
"""Bytes of a process before it has a model: Python and PyTorch (measured), or a CUDA context (a rule of thumb)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Estimate whether a model fits a GPU or CPU, how long training takes and what it costs.

    Without --gpu it plans for this machine, which is measured for a quarter of a second. The optimizer is Muon.
    """

    model: str
    """A preset's name, such as nano-20m, or a YAML file."""
    tokens: float | None = None
    """Tokens to train on, such as 9e9; null: 20 for each parameter (arXiv:2203.15556)."""
    gpu: str | None = None
    """A known GPU (h100, h200, a100-80gb, rtx4090 ...; an unknown name lists them), or its memory, such as 8GB."""
    gpus: int = 1
    """Number of GPUs, one process each; above 8, in hosts of 8."""
    cpu: bool = False
    """Plan for the CPU cores of this machine, even if it has a GPU."""
    tflops: float | None = None
    """Dense bfloat16 TFLOP/s of each GPU, in place of the known value."""
    batch_size: int | None = None
    """Sequences per optimizer step, over all GPUs; null: chosen by the number of tokens."""
    scale: Path | None = None
    """A ladder, the scale.json of nanollm scale: the loss to expect of its recipe, with an interval."""
    price: float | None = None
    """Price per hour of one GPU, or of this machine."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.cpu and (self.gpu is not None or self.gpus > 1 or self.tflops is not None):
            raise ValueError("cpu means the cores of this machine; leave out gpu, gpus and tflops, or leave out cpu")
        for name in ("tokens", "tflops", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {value:g}")
        if self.gpus < 1 or (self.gpus > GPUS_PER_HOST and self.gpus % GPUS_PER_HOST):
            raise ValueError(f"gpus must be from 1 to 8, or a multiple of 8 (hosts of 8), got {self.gpus}")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % self.gpus):
            raise ValueError(f"batch_size must be a multiple of gpus ({self.gpus}), got {self.batch_size:,}")


def run(c: Config) -> str:
    facts = describe(c, hardware_of(c))
    return json.dumps(facts, indent=2) if c.json else table(facts)


def hardware_of(c: Config) -> Hardware:
    """What is planned for. ValueError where it is unknown."""
    found = hardware.known_gpu(c.gpu) if c.gpu is not None else this_machine(c.cpu)
    if found.kind == "cpu" and (c.gpus > 1 or c.tflops is not None):
        raise ValueError("this machine has no GPU that PyTorch can use; say which is meant, such as --gpu h100")
    return found if c.tflops is None else replace(found, tflops=c.tflops)


def this_machine(cpu: bool = False) -> Hardware:
    """This machine, measured; all of its memory, whoever else uses it now."""
    world = World.start("cpu" if cpu else "auto")
    device, dtype = world.device, world.names["dtype"]
    tflops = hardware.measure_gemm(device, world.dtype)
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        name = torch.cuda.get_device_name(device)
        return Hardware(name=name, kind="cuda", memory=total, tflops=tflops / PRODUCT_SHARE, dtype=dtype)
    if device.type != "cpu":
        raise ValueError(f"no training was timed on {device.type}; plan for --cpu, or a GPU such as --gpu h100")
    if hardware.is_shared():
        say(f"other programs are at work (load {hardware.load():.1f}): this machine is measured slower than it is")
    known = hardware.memory()
    name = f"{torch.get_num_threads()} CPU threads, here"
    return Hardware(name=name, kind="cpu", memory=known and known[1], tflops=tflops, dtype=dtype)


# --- how the sequences of a step lie ---


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many sequences each process takes at once, how often, and whether the processes divide the model."""

    micro_batch_size: int
    micro_batches: int
    """Of each process in a step."""
    gpus: int
    parallel: Literal["ddp", "fsdp", "hsdp"]
    recompute: bool

    @property
    def batch_size(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.gpus


def layouts(m: ModelConfig, kind: str, batch_size: int, gpus: int) -> Iterator[Layout]:
    """Every way to divide a step, what is preferred first: plain before divided, and that before computed again."""
    own, most = batch_size // gpus, max(1, MAX_MICRO_BATCH_TOKENS[kind] // m.context_length)
    sizes = [n for n in range(min(own, most), 0, -1) if own % n == 0]
    shards: list[Literal["ddp", "fsdp", "hsdp"]] = ["ddp"]
    shards += [] if gpus == 1 else ["fsdp"] if gpus <= GPUS_PER_HOST else ["hsdp"]
    for recompute in (False, True):
        for parallel in shards:
            for n in sizes:
                yield Layout(
                    micro_batch_size=n, micro_batches=own // n, gpus=gpus, parallel=parallel, recompute=recompute
                )


def memory_of(m: ModelConfig, h: Hardware, layout: Layout) -> TrainingMemory:
    """Peak of one process, without its libraries."""
    compute_bytes: Literal[2, 4] = 4 if h.dtype == "float32" else 2
    return training_memory(
        m,
        sequences=layout.micro_batch_size,
        compute_bytes=compute_bytes,
        optimizer="muon",
        recompute=layout.recompute,
        is_fused=h.kind == "cpu" and fused.fits(*m.head_widths, getattr(torch, h.dtype), torch.device("cpu")),
        accumulates=layout.micro_batches > 1,
        on_gpu=h.kind == "cuda",
        parts=1 if layout.parallel == "ddp" else min(layout.gpus, GPUS_PER_HOST),
    )


def machine_bytes(m: ModelConfig, h: Hardware, layout: Layout) -> int:
    """Memory that a machine, or each GPU, must have for this layout to fit."""
    return math.ceil((memory_of(m, h, layout).total + LIBRARIES[h.kind]) / (1 - RESERVED[h.kind]))


def choose(m: ModelConfig, h: Hardware, batch_size: int, gpus: int) -> Layout | None:
    """The first layout that fits; None: none does."""
    every = layouts(m, h.kind, batch_size, gpus)
    return next((one for one in every if h.memory is None or machine_bytes(m, h, one) <= h.memory), None)


def good_batch_size(m: ModelConfig, tokens: float, gpus: int = 1) -> int:
    """Sequences of a step to begin with: a power of two of them for each GPU."""
    return gpus * 2 ** max(0, round(math.log2(tokens_per_step(tokens) / m.context_length / gpus)))


def recipe(m: ModelConfig, h: Hardware, batch_size: int, tokens: float) -> dict[str, Any]:
    """Options of pretrain for so many tokens, at least one step: what ladders are trained with and --budget chooses."""
    layout = choose(m, h, batch_size, 1)
    if layout is None:
        raise ValueError(nothing_fits(m, h, batch_size, 1, f"a model of {m.total_parameters:,} parameters"))
    steps = max(1, int(tokens / batch_size / m.context_length))
    return {
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.micro_batch_size": layout.micro_batch_size,
        "speed.recompute": layout.recompute,
        **manner(m, steps),
    }


def manner(m: ModelConfig, steps: int) -> dict[str, Any]:
    """What of these does not depend on the machine."""
    windows = max(1, VALIDATION_TOKENS // m.context_length)
    return {"start": "fast", "optim.warmup_steps": steps // 20, "validation_windows": windows}


# --- the plan ---


def describe(c: Config, h: Hardware) -> dict[str, Any]:
    """All facts, as plain numbers with their units in the names. ValueError where nothing fits."""
    m: ModelConfig = load_config("model", c.model, ModelConfig)
    tokens = c.tokens if c.tokens is not None else TOKENS_PER_PARAMETER * m.total_parameters
    batch_size = c.batch_size or good_batch_size(m, tokens, c.gpus)
    layout = choose(m, h, batch_size, c.gpus)
    if layout is None:
        raise ValueError(nothing_fits(m, h, batch_size, c.gpus, c.model))
    steps = math.ceil(tokens / (batch_size * m.context_length))
    memory, libraries = memory_of(m, h, layout), LIBRARIES[h.kind]
    time = time_facts(m, h, layout, steps)
    seen = steps * batch_size * m.context_length
    return {
        "model": c.model,
        "parameters": {"total": m.total_parameters, "active": m.active_parameters},
        "context_length": m.context_length,
        "tokens": seen,
        "steps": steps,
        "hardware": asdict(h) | {"count": c.gpus, "is_measured": c.gpu is None and c.tflops is None},
        "layout": asdict(layout) | {"batch_size": batch_size},
        "memory_bytes": asdict(memory) | {"libraries": libraries, "total": memory.total + libraries, "of": h.memory},
        "time": time,
        "cost": None if c.price is None or time is None else c.price * time["gpu_hours"],
        "loss": None if c.scale is None else loss_facts(Ladder.read(c.scale), m, seen),
        "command": command(c, m, layout, steps),
    }


def loss_facts(ladder: Ladder, m: ModelConfig, tokens: float) -> dict[str, Any]:
    """Bits per byte to expect on the ladder's validation text, or the reason why nothing can be said."""
    try:
        found = ladder.predict(m, tokens)
    except ValueError as reason:
        return {"unknown": str(reason)}
    return {"bits_per_byte": found.value, "low": found.low, "high": found.high, "level": LEVEL, "ladder": ladder.name}


def told(loss: Mapping[str, Any]) -> str:
    """The same in words."""
    if "unknown" in loss:
        return f"unknown: {loss['unknown']}"
    interval = f"{loss['level']:.0%} interval {loss['low']:.3f} to {loss['high']:.3f}"
    return f"{loss['bits_per_byte']:.3f} bits per byte, {interval}, as the runs of {loss['ladder']} have it"


def time_facts(m: ModelConfig, h: Hardware, layout: Layout, steps: int) -> dict[str, Any] | None:
    """Of training alone, messages between GPUs not counted; None where the hardware's peak is unknown."""
    if h.tflops is None:
        return None
    parameters = {name: ModelConfig(**load_preset("model", name)).total_parameters for name in MFU[h.kind]}
    measured = min(parameters, key=lambda name: abs(math.log(parameters[name] / m.total_parameters)))
    mfu = MFU[h.kind][measured]
    again = 4 / 3 if layout.recompute else 1  # the forward pass, a third of the work, twice
    rate = layout.gpus * mfu * h.tflops * TERA / (again * m.training_flops_per_token())
    hours = steps * layout.batch_size * m.context_length / rate / 3600
    return {
        "tokens_per_s": rate,
        "hours": hours,
        "gpu_hours": hours * layout.gpus,
        "mfu": mfu,
        "mfu_measured_with": f"{measured} on {'two CPU cores' if h.kind == 'cpu' else 'one H200'}",
    }


def tokens_per_s(m: ModelConfig, h: Hardware) -> float | None:
    """In one process; None where the smallest step does not fit."""
    layout = choose(m, h, 1, 1)
    facts = layout and time_facts(m, h, layout, 1)
    return facts["tokens_per_s"] if facts else None


def nothing_fits(m: ModelConfig, h: Hardware, batch_size: int, gpus: int, name: str) -> str:
    """The message that says what would fit instead."""
    assert h.memory is not None
    least = min(machine_bytes(m, h, layout) for layout in layouts(m, h.kind, batch_size, gpus))
    larger = sorted((gpu.memory, gpu.name) for gpu in GPUS.values() if gpu.memory and gpu.memory >= least)
    hint = f"; {larger[0][1]} has that" if larger and h.kind == "cuda" else ""
    return f"{name} does not fit into {size(h.memory)}: its smallest step takes {size(least)}{hint}"


def command(c: Config, m: ModelConfig, layout: Layout, steps: int) -> str:
    """What to type; TOKENIZER and TOKENS stand for the folders that tokenizer and preprocess made."""
    start = ["nanollm", "pretrain"]
    if layout.gpus > GPUS_PER_HOST:
        start = ["sbatch", f"--nodes={layout.gpus // GPUS_PER_HOST}", "recipes/pretrain.sbatch"]
    elif layout.gpus > 1:
        start = ["torchrun", "--standalone", f"--nproc-per-node={layout.gpus}", "-m", *start]
    paths = ["--tokenizer_path", "TOKENIZER", "--data", "TOKENS", "--out", f"runs/{Path(c.model).stem}"]
    numbers = {"steps": steps, "batch_size": layout.batch_size, "micro_batch_size": layout.micro_batch_size}
    chosen = {f"train.{name}": value for name, value in numbers.items()} | (manner(m, steps) if c.scale else {})
    train = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    more = ["--parallel", layout.parallel] * (layout.gpus > 1) + ["--speed.recompute"] * layout.recompute
    more += ["--device", "cpu"] * c.cpu
    return shlex.join([*start, "--model", c.model, *paths, *train, *more])


# --- for people ---


def table(facts: dict[str, Any]) -> str:
    """What people decide by, one line each, and the command."""
    parameters, layout, memory, time = facts["parameters"], facts["layout"], facts["memory_bytes"], facts["time"]
    h, gpus = facts["hardware"], layout["gpus"]
    of = f" of {size(memory['of'])}" if memory["of"] else ""
    parts = [f"{name.replace('_', ' ')} {size(n)}" for name, n in memory.items() if n and name not in ("total", "of")]
    rows = {
        "model": f"{facts['model']}: {parameters['total']:,} parameters, {parameters['active']:,} active per token, "
        f"context {facts['context_length']:,}",
        "training": f"{facts['tokens']:,} tokens in {facts['steps']:,} steps of {layout['batch_size']:,} sequences",
        "hardware": (f"{gpus} x " if gpus > 1 else "")
        + f"{h['name']}: {size(h['memory']) if h['memory'] else 'memory unknown'}, "
        + (f"{h['tflops']:,.4g} TFLOP/s" if h["tflops"] else "TFLOP/s unknown")
        + (", measured just now" if h["is_measured"] else ""),
        "layout": f"micro-batches of {layout['micro_batch_size']} sequences, {layout['micro_batches']:,} a step"
        + (f" on each of {gpus:,} GPUs, {layout['parallel']}" if gpus > 1 else "")
        + (", activations recomputed (--speed.recompute)" if layout["recompute"] else ""),
        "memory": f"{size(memory['total'])}{of} at the peak ({', '.join(parts)}; gradients come while activations go)",
        "time": "unknown: say how fast it is, such as --tflops 40",
    }
    if time is not None:
        rows["time"] = (
            f"{duration(3600 * time['hours'])} at {time['tokens_per_s']:,.0f} tokens/s: {time['mfu']:.0%} of the peak, "
            f"as measured with {time['mfu_measured_with']}; not counted: validation, saving"
            + (", messages between GPUs" if gpus > 1 else "")
        )
    if facts["loss"] is not None:
        rows["loss"] = told(facts["loss"])
    if facts["cost"] is not None:
        rows["cost"] = f"{facts['cost']:,.2f} ({time['gpu_hours']:,.2f} hours)"
    return "\n".join([*(f"{name:<10}{text}" for name, text in rows.items()), "", facts["command"]])
