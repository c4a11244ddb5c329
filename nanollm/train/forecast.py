"""How long does training take on a machine that may not be here yet, and what fits into it?

A step is four kinds of work: products (floating-point operations), small operations between them (bytes that they read
and write), what goes through all weights (bytes), and calls that take their time whatever their size. A machine does so
many of each per second. It never does what a data sheet, or a loop of one product, says of it: `Rates` tell what
measured steps reached (docs/planning.md).
Letters: N parameters, M of them in hidden matrices (Muon's), P processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from nanollm.bundle import build_model
from nanollm.model.config import ModelConfig
from nanollm.train.machines import BESIDE, GB, GPUS, PER_HOST, RESERVED, TERA, Kind, Machine
from nanollm.train.memory import TrainingMemory, kept_bytes_per_token, training_memory
from nanollm.train.optim import is_hidden_matrix

Optimizer = Literal["muon", "adamw"]
Parallel = Literal["ddp", "fsdp", "hsdp"]

NETWORK_GB_PER_S = 50.0
"""Between hosts, for each GPU: 400 Gb/s InfiniBand."""
WIRE_SHARE, LATENCY_S, MESSAGES = 0.8, 20e-6, 22
"""Of a wire's rate, usual for messages of many megabytes; what a message takes longer for each doubling of the
processes; messages of a pass (FSDP2: one for each block, root and norm). As in docs/scaling.md: computed."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How much of what a machine is said to do a training step reaches."""

    products: float
    """Share of Machine.tflops."""
    traffic: float
    """Times that what is kept for the backward pass is read and written by small operations."""
    call_s: float
    """Of each block in each micro-batch, whatever its size."""
    source: str


RATES: dict[Kind, Rates] = {
    "cpu": Rates(products=0.733, traffic=12.2, call_s=2.0e-3, source="fitted to nano-5m and nano-60m on two CPU cores"),
    "cuda": Rates(
        products=0.589,
        traffic=6.5,
        call_s=0.54e-3,
        source="measured with nano-327m on one H200 (39.5 % of its data sheet), assumed for any other GPU and model",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the sequences of a step lie: on each of some processes, micro-batch by micro-batch."""

    sequences: int
    """Of a micro-batch."""
    micro_batches: int
    """Of each process in a step."""
    processes: int = 1
    parallel: Parallel = "ddp"
    recompute: bool = False

    @property
    def batch_size(self) -> int:
        """Sequences of a step, of all processes."""
        return self.sequences * self.micro_batches * self.processes

    @property
    def parts(self) -> int:
        """Processes that hold one copy of the model together."""
        return {"ddp": 1, "fsdp": self.processes, "hsdp": min(self.processes, PER_HOST)}[self.parallel]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does in one step."""

    flops: float
    small: float
    """Bytes that small operations read and write."""
    moved: float
    """Bytes of weights, gradients and what the optimizer remembers."""
    calls: int
    """Blocks times micro-batches."""


# --- memory ---


def memory_of(c: ModelConfig, machine: Machine, layout: Layout, optimizer: Optimizer) -> TrainingMemory:
    """Peak of one process, without what it takes before it has a model."""
    return training_memory(
        c,
        sequences=layout.sequences,
        compute_bytes=machine.compute_bytes,
        optimizer=optimizer,
        recompute=layout.recompute,
        is_fused=machine.is_fused,
        accumulates=layout.micro_batches > 1,
        on_gpu=machine.kind == "cuda",
        parts=layout.parts,
    )


def cache_bytes_per_token(c: ModelConfig, compute_bytes: int) -> int:
    """What answering keeps of one token: the latent and the rotary key of every block."""
    return c.cache_width * c.n_blocks * compute_bytes


def tokens_beside_weights(c: ModelConfig, machine: Machine, weight_bytes: int) -> int:
    """Tokens whose cache fits into a machine's memory beside the weights, each of so many bytes; 0: not even those."""
    room = machine.usable - weight_bytes * c.total_parameters
    return max(0, room // cache_bytes_per_token(c, machine.compute_bytes))


# --- time ---


def step_s(c: ModelConfig, machine: Machine, layout: Layout, optimizer: Optimizer) -> float:
    """Seconds of a step, nothing that is sent between processes hidden behind what is computed."""
    assert machine.tflops is not None and machine.gb_per_s is not None
    rates, work = RATES[machine.kind], work_of(c, machine, layout, optimizer)
    products = work.flops / (rates.products * machine.tflops * TERA)
    small = work.small / ((machine.norm_gb_per_s or machine.gb_per_s) * GB)
    moved = work.moved / (machine.gb_per_s * GB)
    return products + small + moved + work.calls * rates.call_s + wires_s(c, machine, layout)


def tokens_per_s(c: ModelConfig, machine: Machine, layout: Layout, optimizer: Optimizer) -> float:
    """Of all processes."""
    return layout.batch_size * c.context_length / step_s(c, machine, layout, optimizer)


def work_of(c: ModelConfig, machine: Machine, layout: Layout, optimizer: Optimizer) -> Work:
    """What one process does in one step, its messages left out."""
    tokens = layout.sequences * layout.micro_batches * c.context_length
    again = 1 / 3 if layout.recompute else 0.0  # the forward pass of the blocks, a third of their work
    in_blocks = c.training_flops_per_token() - 6 * c.vocab_size * c.d_model
    flops = tokens * (c.training_flops_per_token() + again * in_blocks)
    kept = kept_bytes_per_token(c, machine.compute_bytes, False, machine.is_fused, machine.kind == "cuda")
    update, per_weight = update_of(c, optimizer), GRADIENT_BYTES + (SHARDED_BYTES if layout.processes > 1 else 0)
    return Work(
        flops=flops + update.flops,
        small=tokens * RATES[machine.kind].traffic * (1 + again) * kept,
        moved=layout.micro_batches * per_weight * c.total_parameters + update.moved,
        calls=layout.micro_batches * c.n_blocks,
    )


GRADIENT_BYTES = 10
"""For each parameter and micro-batch: its gradient is read in two bytes and added in four."""
ADAMW_BYTES, MUON_BYTES = 46, 66
"""For each parameter and step: norm and clipping of the gradient, what the optimizer reads and writes, rounding into
the model's parameters."""
SHARDED_BYTES = 183
"""For each parameter and micro-batch: what FSDP2 casts and copies though nothing travels; 12.5 ms of nano-327m on an
H200 (docs/scaling.md)."""
NEWTON_SCHULZ_STEPS = 5


def update_of(c: ModelConfig, optimizer: Optimizer) -> Work:
    """What the optimizer does in one step; with several processes each of them does all of Muon's products."""
    if optimizer == "adamw":
        return Work(flops=0, small=0, moved=ADAMW_BYTES * c.total_parameters, calls=0)
    matrices = hidden_matrices(c)
    flops = sum(count * orthogonalise_flops(*sorted(shape)) for shape, count in matrices.items())
    in_muon = sum(count * math.prod(shape) for shape, count in matrices.items())
    moved = MUON_BYTES * in_muon + ADAMW_BYTES * (c.total_parameters - in_muon)
    return Work(flops=flops, small=0, moved=moved, calls=0)


@cache
def hidden_matrices(c: ModelConfig) -> dict[tuple[int, int], int]:
    """How many matrices of each shape Muon orthogonalises; a stack of experts counts once for each."""
    shapes: dict[tuple[int, int], int] = {}
    for name, parameter in build_model(c).named_parameters():
        if is_hidden_matrix(name, parameter):
            shape = (parameter.shape[-2], parameter.shape[-1])
            shapes[shape] = shapes.get(shape, 0) + parameter.numel() // math.prod(shape)
    return shapes


def orthogonalise_flops(rows: int, columns: int) -> float:
    """Floating-point operations of optim.orthogonalise for a matrix of no more rows than columns."""
    wide, square = 2 * rows * rows * columns, 2 * rows**3
    if 2 * rows >= columns:
        return NEWTON_SCHULZ_STEPS * (2 * wide + square)
    # On the Gram matrix, three steps and two: it is made twice, multiplied with twice; a step takes a square of it, two
    # products to carry it on (not in the last one) and one to collect the factors (not in the first one).
    return 4 * wide + (5 + 2 * 3 + 3) * square


def wires_s(c: ModelConfig, machine: Machine, layout: Layout) -> float:
    """Seconds of one process's messages in a step: gradients once in float32, parameters of each pass as computed in.

    As docs/scaling.md computes them; nobody has measured them on more than one GPU. benchmarks/scaling_table.py does so
    for slower wires as well; a test holds the two together.
    """
    p = layout.processes
    if p == 1:
        return 0.0
    n = c.total_parameters
    hosts, local = max(1, p // PER_HOST), min(p, PER_HOST)
    near, far = (WIRE_SHARE * GB * rate for rate in (machine.link_gb_per_s, NETWORK_GB_PER_S))
    slowest = near if hosts == 1 else far
    delay = MESSAGES * LATENCY_S * math.log2(p)
    if layout.parallel == "ddp":
        return 8 * n * others(p) / slowest + delay
    passes = 2 * layout.micro_batches  # forward and backward
    in_muon = sum(count * math.prod(shape) for shape, count in hidden_matrices(c).items())
    gathered = machine.compute_bytes * (n * passes + in_muon)  # Muon needs its matrices whole once more
    if layout.parallel == "fsdp":
        return (gathered + 4 * n) * others(p) / slowest + delay * (passes + 1)
    within = (gathered + 4 * n) * others(local) / near
    return within + 8 * n / local * others(hosts) / far + delay * (passes + 1)


def others(processes: int) -> float:
    """What a ring sends of a message: all but one's own part."""
    return (processes - 1) / processes


# --- what to choose ---

STEPS_AT_LEAST = 1500
"""So few steps are too few to learn by, whatever each of them sees."""


def good_batch_size(c: ModelConfig, tokens: float, processes: int = 1) -> int:
    """Sequences of a step to begin with: a power of two of them for each process.

    The batch that DeepSeek LLM's fit gives a budget of compute (arXiv:2401.02954, section 3.1: 0.292 C^0.3271 tokens,
    fitted from 1e17 to 2e19 operations), unless that leaves fewer than STEPS_AT_LEAST steps.
    """
    compute = tokens * c.training_flops_per_token()
    wanted = min(0.292 * compute**0.3271, tokens / STEPS_AT_LEAST)
    own = wanted / c.context_length / processes
    return processes * 2 ** max(0, round(math.log2(own))) if own > 0 else processes


def layouts(batch_size: int, processes: int) -> Iterator[Layout]:
    """Every way to divide a step's sequences among the processes and their micro-batches."""
    own = batch_size // processes
    modes: list[Parallel] = ["ddp"] if processes == 1 else ["ddp", "fsdp"]
    modes += ["hsdp"] if processes > PER_HOST else []
    for sequences in divisors(own):
        for parallel in modes:
            for recompute in (False, True):
                yield Layout(
                    sequences=sequences,
                    micro_batches=own // sequences,
                    processes=processes,
                    parallel=parallel,
                    recompute=recompute,
                )


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


ALIKE = 1.02
"""Times that differ by less are not worth memory."""


def choose(c: ModelConfig, machine: Machine, batch_size: int, processes: int, optimizer: Optimizer) -> Layout | None:
    """The fastest layout that fits; of those that are nearly as fast the plainest and smallest. None: none fits.

    A machine whose speed nobody knows is taken to be as fast as a small GPU.
    """
    if machine.tflops is None:
        machine = replace(machine, tflops=GPUS["rtx3090"].tflops, gb_per_s=GPUS["rtx3090"].gb_per_s)
    fitting = {
        layout: step_s(c, machine, layout, optimizer)
        for layout in layouts(batch_size, processes)
        if memory_of(c, machine, layout, optimizer).total <= machine.usable
    }
    if not fitting:
        return None
    least = min(fitting.values())
    alike = [layout for layout, seconds in fitting.items() if seconds <= ALIKE * least]

    def cost(layout: Layout) -> tuple[bool, bool, int]:
        return layout.recompute, layout.parallel == "fsdp", memory_of(c, machine, layout, optimizer).total

    return min(alike, key=cost)


def least_memory(c: ModelConfig, machine: Machine, batch_size: int, processes: int, optimizer: Optimizer) -> int:
    """Bytes of memory that a machine must have for any layout to fit."""
    least = min(memory_of(c, machine, layout, optimizer).total for layout in layouts(batch_size, processes))
    return math.ceil((least + BESIDE[machine.kind]) / (1 - RESERVED[machine.kind]))
