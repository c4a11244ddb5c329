"""How much of a second core training on two processes uses.

The same work for each process: tokens/s of one process with one thread, and of two (torchrun, gloo), in turns; beside
them what the machine itself gives one and two processes that only multiply matrices, measured in the same processes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import ROOT, model_shapes, ones, spread_of, tell

if TYPE_CHECKING:
    from nanollm.model.config import ModelConfig
    from nanollm.world import World

GEMM_S = 3.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="turns, in each of which every side is measured once")
    parser.add_argument("--preset", default="nano-20m", help="model of configs/model/")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=4, help="micro-batches of each process in a step")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"], help="how two processes hold the model")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    for turn in range(options.repeats):
        facts = {f"{what}_{n}": value for n in (1, 2) for what, value in launched(n, options).items()}
        facts["gemm_scaling"] = facts["gemm_gflop_per_s_2"] / facts["gemm_gflop_per_s_1"] / 2
        facts["train_scaling"] = facts["tokens_per_s_2"] / facts["tokens_per_s_1"] / 2
        facts["train_over_gemm"] = facts["train_scaling"] / facts["gemm_scaling"]
        for name, value in facts.items():
            columns.setdefault(name, []).append(value)
        tell(f"turn {turn + 1} of {options.repeats}: " + ", ".join(f"{name} {v:.4g}" for name, v in facts.items()))
    return {"unit": "tokens/s, GFLOP/s, shares", **{name: spread_of(values) for name, values in columns.items()}}


def launched(processes: int, options: argparse.Namespace) -> dict[str, float]:
    """Both numbers of so many processes, together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    words = [str(value) for value in (options.preset, options.rows, options.micro_batches, options.steps)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.weak_scaling", *words, options.parallel],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def one_rank(preset: str, rows: int, micro_batches: int, steps: int, parallel: str) -> None:
    """What every process does; the main one prints the numbers of all."""
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig
    from nanollm.world import World

    c = ModelConfig(**load_preset("model", preset))
    with World.join("cpu", "auto", parallel) as world:  # type: ignore[arg-type]
        gemm = world.all_reduce_sum(multiplied(c, rows, world))
        tokens = trained(c, rows, micro_batches, steps, world)
        if world.is_main:
            print(json.dumps({"gemm_gflop_per_s": gemm, "tokens_per_s": tokens}), flush=True)


def multiplied(c: "ModelConfig", rows: int, world: "World") -> float:
    """GFLOP/s of this process while all multiply matrices of the model's shapes."""
    from torch.nn import functional as F

    shapes = model_shapes(c, rows * c.context_length)
    pairs = [(ones(n, width, world.dtype, "cpu"), ones(out, width, world.dtype, "cpu")) for n, width, out in shapes]
    for x, weight in pairs:
        F.linear(x, weight)
    world.barrier()
    begun, work = time.perf_counter(), 0.0
    while (elapsed := time.perf_counter() - begun) < GEMM_S:
        for (x, weight), (n, width, out) in zip(pairs, shapes, strict=True):
            F.linear(x, weight)
            work += 2 * n * width * out / 1e9
    return work / elapsed


def trained(c: "ModelConfig", rows: int, micro_batches: int, steps: int, world: "World") -> float:
    """Tokens/s of all processes."""
    import torch

    from nanollm.data.batches import Batch
    from nanollm.model.transformer import Transformer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step

    optim = OptimConfig(lr=3e-3)
    state = TrainState.start(Transformer(c).init(0), optim, world)
    ids = torch.randint(c.vocab_size, (rows, c.context_length + 1), generator=torch.Generator().manual_seed(world.rank))
    batches = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * micro_batches

    def step() -> None:
        train_step(state, batches, next_token_loss, 1e-3, optim, world)

    step()
    world.barrier()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    world.barrier()
    return steps * micro_batches * rows * c.context_length * world.size / (time.perf_counter() - begun)


if __name__ == "__main__":
    one_rank(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
