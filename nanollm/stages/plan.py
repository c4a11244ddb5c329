"""What fits, how long does it take, and what does it cost, before anything is rented?"""

import dataclasses
import json
import math
import os
import shlex
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nanollm import machine as looking
from nanollm.model.config import ModelConfig
from nanollm.progress import say
from nanollm.settings import load_preset, preset_names
from nanollm.stages.info import size
from nanollm.train.forecast import (
    RATES,
    Layout,
    Optimizer,
    cache_bytes_per_token,
    choose,
    good_batch_size,
    least_memory,
    memory_of,
    tokens_beside_weights,
    tokens_per_s,
)
from nanollm.train.machines import (
    BESIDE,
    BYTES_PER_FLOP,
    GB,
    GPUS,
    PER_HOST,
    TERA,
    Machine,
    known_gpu,
    memory_in,
    this_machine,
)
from nanollm.world import World

POSITIONAL = ("model",)

TOKENS_PER_PARAMETER = 20
MOST, MOST_TOKENS, MOST_GPUS = 10**9, 1e16, 65_536


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say what fits on a machine, how long training takes there and what it costs; ends with the command to type.

    Without --gpu and --cpu it plans for this machine, which is measured for a second.
    """

    model: ModelConfig
    """A preset's name, a YAML file, or single values."""
    tokens: float | None = None
    """Tokens to train on, such as 9e9; null: 20 for each parameter (arXiv:2203.15556)."""
    gpu: str | None = None
    """A known GPU (h100, h200, a100-80gb, rtx4090 ...; an unknown name lists them), or its memory, such as 8GB."""
    gpus: int = 1
    """GPUs, each with a process of its own; above 8: hosts of 8."""
    cpu: bool = False
    """Plan for the cores of this machine."""
    memory: str | None = None
    """Memory of the machine or of each GPU, such as 16GB, instead of what is known of it."""
    tflops: float | None = None
    """TFLOP/s of each GPU in bfloat16 without sparsity, instead of what is known of it."""
    batch_size: int | None = None
    """Sequences of an optimizer step, on all GPUs together; null: what suits the number of tokens."""
    optimizer: Optimizer = "muon"
    """Optimizer of training."""
    price: float | None = None
    """Price of one GPU for an hour; with --cpu, of the machine."""
    currency: str = ""
    """What the price is in, such as EUR; it is only repeated."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.tokens is not None and not 1 <= self.tokens <= MOST_TOKENS:
            raise ValueError(f"tokens must be from 1 to {MOST_TOKENS:g}, got {self.tokens:g}")
        if not 1 <= self.gpus <= MOST_GPUS:
            raise ValueError(f"gpus must be from 1 to {MOST_GPUS:,}, got {self.gpus:,}")
        if self.gpus > PER_HOST and self.gpus % PER_HOST:
            raise ValueError(f"gpus above {PER_HOST} must be a multiple of {PER_HOST} (hosts of 8), got {self.gpus}")
        if self.cpu and (self.gpu is not None or self.gpus > 1 or self.tflops is not None):
            raise ValueError(
                "cpu plans for the cores of this machine; leave out gpu, gpus and tflops, or leave out cpu"
            )
        for name in ("tflops", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {value:g}")
        if self.batch_size is not None and (not 1 <= self.batch_size <= MOST or self.batch_size % self.gpus):
            raise ValueError(
                f"batch_size must be a multiple of gpus ({self.gpus}), at most {MOST:,}, got {self.batch_size:,}"
            )


def run(c: Config) -> str:
    facts = describe(c, machine_of(c))
    return json.dumps(facts, indent=2) if c.json else table(facts)


# --- the machine ---


def machine_of(c: Config) -> Machine:
    """The machine that is planned for. ValueError for one that nobody knows."""
    memory = None if c.memory is None else memory_in(c.memory, "memory")
    found = known_gpu(c.gpu) if c.gpu is not None else here(c, memory)
    if memory is not None:
        found = dataclasses.replace(found, memory=memory)
    if c.tflops is not None:
        gb_per_s = found.gb_per_s or c.tflops * TERA * BYTES_PER_FLOP / GB
        found = dataclasses.replace(found, tflops=c.tflops, gb_per_s=gb_per_s)
    return found


def here(c: Config, memory: int | None) -> Machine:
    """This machine, measured."""
    world = World.start("cpu" if c.cpu else "auto")
    if world.device.type == "cpu":
        if c.gpus > 1 or c.tflops is not None:
            raise ValueError("this machine has no GPU that PyTorch can use; say which is meant, such as --gpu h100")
        if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > looking.usable_cores() / 2:
            say(f"other programs are at work (load {load:.1f}): this machine is measured slower than it is")
    return this_machine(c.model, world, memory)


# --- the plan ---


def describe(c: Config, machine: Machine) -> dict[str, Any]:
    """All facts, as plain numbers with their units in the names. ValueError where nothing fits."""
    m, words = c.model, model_words(c.model)
    tokens = c.tokens if c.tokens is not None else TOKENS_PER_PARAMETER * m.total_parameters
    batch_size = c.batch_size or good_batch_size(m, tokens, c.gpus)
    layout = choose(m, machine, batch_size, c.gpus, c.optimizer)
    if layout is None:
        raise ValueError(nothing_fits(c, machine, batch_size, words[1]))
    if (steps := math.ceil(tokens / (batch_size * m.context_length))) > MOST:
        raise ValueError(
            f"{tokens:g} tokens are {steps:,} steps of batch_size {batch_size:,}; at most {MOST:,} are taken"
        )
    memory = memory_of(m, machine, layout, c.optimizer)
    timed = None if machine.tflops is None else time_facts(c, machine, layout, steps)
    return {
        "model": " ".join(words[1:]),
        "parameters": {"total": m.total_parameters, "active": m.active_parameters},
        "context_length": m.context_length,
        "tokens": steps * batch_size * m.context_length,
        "steps": steps,
        "machine": asdict(machine) | {"count": c.gpus, "rates": rates_of(c)},
        "layout": asdict(layout) | {"batch_size": batch_size, "optimizer": c.optimizer},
        "memory_bytes": asdict(memory)
        | {"beside": BESIDE[machine.kind], "total": memory.total + BESIDE[machine.kind], "of": machine.memory},
        "time": timed,
        "cost": cost_facts(c, timed),
        "serving": serving_facts(m, machine),
        "command": command(c, machine, layout, steps, words),
    }


def rates_of(c: Config) -> Literal["given", "measured", "data sheet"]:
    """Where the machine's rates come from."""
    return "given" if c.tflops is not None else "measured" if c.gpu is None else "data sheet"


def time_facts(c: Config, machine: Machine, layout: Layout, steps: int) -> dict[str, Any]:
    """Of training alone: validation, samples and checkpoints come on top."""
    assert machine.tflops is not None
    rate = tokens_per_s(c.model, machine, layout, c.optimizer)
    hours = steps * layout.batch_size * c.model.context_length / rate / 3600
    done = c.model.training_flops_per_token() * rate
    return {
        "tokens_per_s": rate,
        "hours": hours,
        "gpu_hours": hours * layout.processes,
        "share_of_peak": done / (layout.processes * machine.tflops * TERA),
        "source": RATES[machine.kind].source,
    }


def cost_facts(c: Config, timed: dict[str, Any] | None) -> dict[str, Any] | None:
    """Nothing without a price, or where nobody knows how long it takes."""
    if c.price is None or timed is None:
        return None
    return {"price": c.price, "currency": c.currency, "amount": c.price * timed["gpu_hours"]}


def serving_facts(m: ModelConfig, machine: Machine) -> dict[str, Any]:
    """Tokens and conversations of full context whose cache fits beside the weights; int8 is for CPUs alone."""
    kinds: dict[str, int] = {machine.dtype: machine.compute_bytes}
    kinds |= {"int8": 1} if machine.kind == "cpu" else {}
    fits = {}
    for kind, weight_bytes in kinds.items():
        tokens = tokens_beside_weights(m, machine, weight_bytes)
        weights = weight_bytes * m.total_parameters
        fits[kind] = {"weight_bytes": weights, "tokens": tokens, "conversations": tokens // m.context_length}
    return {"cache_bytes_per_token": cache_bytes_per_token(m, machine.compute_bytes), "fits": fits}


def nothing_fits(c: Config, machine: Machine, batch_size: int, name: str) -> str:
    """What would fit instead."""
    least = least_memory(c.model, machine, batch_size, c.gpus, c.optimizer)
    larger = sorted((gpu.memory, gpu.name) for gpu in GPUS.values() if gpu.memory >= least)
    known = f", which {larger[0][1]} has" if larger else ", which no GPU has that is known"
    smaller = [preset for preset in preset_names("model") if fits(preset, c, machine)]
    instead = f"; {max(smaller, key=parameters_of)} is the largest preset that fits" if smaller else ""
    return (
        f"{name} with {c.optimizer} does not fit into {size(machine.memory)}: its smallest step wants a machine of "
        f"{size(math.ceil(least / 1e8) * 10**8)}{known if machine.kind == 'cuda' else ''}{instead}"
    )


def fits(preset: str, c: Config, machine: Machine) -> bool:
    m = preset_of(preset)
    return choose(m, machine, c.gpus, c.gpus, c.optimizer) is not None


def parameters_of(preset: str) -> int:
    return preset_of(preset).total_parameters


def preset_of(name: str) -> ModelConfig:
    return ModelConfig(**load_preset("model", name))


# --- the command ---


def model_words(m: ModelConfig) -> list[str]:
    """The options that make this model: the preset that is most like it, and where it differs from that."""
    differing = {
        name: {key: value for key, value in asdict(m).items() if value != asdict(preset_of(name))[key]}
        for name in preset_names("model")
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return ["--model", name] + [
        word for key, value in differing[name].items() for word in (f"--model.{key}", str(value).lower())
    ]


def command(c: Config, machine: Machine, layout: Layout, steps: int, words: list[str]) -> str:
    """What to type; where tokenizer and token files are is taken from the README."""
    start = ["nanollm", "pretrain"]
    if layout.processes > PER_HOST:
        start = ["sbatch", f"--nodes={layout.processes // PER_HOST}", "recipes/pretrain.sbatch"]
    elif layout.processes > 1:
        start = ["torchrun", "--standalone", f"--nproc-per-node={layout.processes}", "-m", *start]
    paths = ["--tokenizer_path", "checkpoints/tokenizer", "--data", "data/owt", "--out", f"runs/{words[1]}"]
    numbers = {"steps": steps, "batch_size": layout.batch_size, "micro_batch_size": layout.sequences}
    train = [word for name, value in numbers.items() for word in (f"--train.{name}", str(value))]
    more = [*["--parallel", layout.parallel] * (layout.processes > 1)]
    more += ["--optim.name", c.optimizer] * (c.optimizer != "muon")
    more += ["--speed.recompute"] * layout.recompute
    more += ["--device", "cpu"] * (c.cpu and World.start().device.type != "cpu")
    return shlex.join([*start, *words, *paths, *train, *more])


# --- for people ---


def table(facts: dict[str, Any]) -> str:
    """What people decide by, one line each, and the command."""
    rows = {
        "model": f"{facts['model']}: {facts['parameters']['total']:,} parameters, "
        f"{facts['parameters']['active']:,} active per token, context {facts['context_length']:,}",
        "training": f"{facts['tokens']:,} tokens in {facts['steps']:,} steps of {facts['layout']['batch_size']:,} "
        f"sequences with {facts['layout']['optimizer']}",
        "machine": machine_line(facts["machine"]),
        "fits": fits_line(facts["layout"]),
        "memory": memory_line(facts["memory_bytes"], facts["machine"]),
        **time_lines(facts["time"], facts["machine"]),
    }
    if cost := facts["cost"]:
        hours = facts["time"]["gpu_hours"]
        unit = f" {cost['currency']}" if cost["currency"] else ""
        rows["cost"] = f"{cost['amount']:,.2f}{unit} ({hours:,.2f} hours at {cost['price']:g}{unit} each)"
    rows["serving"] = serving_line(facts["serving"], facts["context_length"])
    lines = [f"{name:<10}{text}" for name, text in rows.items()]
    return "\n".join([*lines, "", facts["command"]])


def machine_line(machine: dict[str, Any]) -> str:
    count = f"{machine['count']} x " if machine["count"] > 1 else ""
    rate = "rate unknown"
    if machine["tflops"] is not None:
        rate = f"{machine['tflops']:,.4g} TFLOP/s, {machine['gb_per_s']:,.4g} GB/s"
        # Of a GPU one product is measured, and taken for the share of the data sheet that an H200 reached with it.
        how = "measured just now" if machine["kind"] == "cpu" else "reckoned from a product measured just now"
        rate += f", {how}" if machine["rates"] == "measured" else ""
    return f"{count}{machine['name']}: {size(machine['memory'])}, {rate}"


def fits_line(layout: dict[str, Any]) -> str:
    """micro_batch_size, how many of them, and what it takes."""
    said = f"micro-batches of {layout['sequences']} sequences, {layout['micro_batches']:,} a step"
    if layout["processes"] > 1:
        said += f" on each of {layout['processes']:,} GPUs, {layout['parallel']}"
    return said + (", blocks computed again (--speed.recompute)" if layout["recompute"] else "")


def memory_line(memory: dict[str, int], machine: dict[str, Any]) -> str:
    beside = "PyTorch itself" if machine["kind"] == "cpu" else "CUDA's own, assumed"
    named = {"kept_gradients": "gradients of earlier micro-batches", "beside": beside}
    parts = [f"{named.get(name, name)} {size(n)}" for name, n in memory.items() if n and name not in ("total", "of")]
    each = " of each" if machine["count"] > 1 else ""
    return (
        f"{size(memory['total'])} of {size(memory['of'])}{each} at the peak ({', '.join(parts)}; gradients come while "
        f"activations go)"
    )


def time_lines(timed: dict[str, Any] | None, machine: dict[str, Any]) -> dict[str, str]:
    if timed is None:
        return {"time": "unknown: say how fast it is, such as --tflops 40"}
    what = {"given": "what was given", "measured": "what it can do here", "data sheet": "its data sheet"}
    wires = "; wires as docs/scaling.md computes them" if machine["count"] > 1 else ""
    return {
        "time": f"{duration(timed['hours'])} at {timed['tokens_per_s']:,.0f} tokens/s, {timed['share_of_peak']:.0%} of "
        f"{what[machine['rates']]}; validation and saving not counted",
        "by": timed["source"] + wires,
    }


def duration(hours: float) -> str:
    """In the unit people say."""
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} seconds"
    if hours < 2:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 48 else "")


def serving_line(serving: dict[str, Any], context: int) -> str:
    parts = [
        f"in {kind} {fit['tokens']:,} tokens ({fit['conversations']:,} conversations of {context:,}) beside "
        f"{size(fit['weight_bytes'])} of weights"
        for kind, fit in serving["fits"].items()
    ]
    return f"{serving['cache_bytes_per_token']:,} bytes of cache per token: {'; '.join(parts)}"
