"""What is left of the speed while other programs are at work.

Training nano-1m and nano-20m, decoding one reply, and a GRPO step, each in processes of its own: on a quiet machine,
beside one and two programs that do nothing but count, and two of a kind at once. In turns with the same under libgomp's
own way to wait (nanollm/threads.py), which is what a program without NanoLLM's gets.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.measuring import ROOT, spread_of, tell

WORK = ("train nano-1m", "train nano-20m", "generate", "grpo")
AS_LIBGOMP = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's default, but given by the user, so that nothing else is chosen and nothing is watched."""
START_S = 12.0
"""For a process to be ready; all that measure at once begin together after it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="turns, in each of which every number is measured once")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a measurement")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK, help="what is measured")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {"unit": "tokens/s; shares of the quiet speed of the same turn"}
    for work in options.work:
        columns: dict[str, list[float]] = {}
        for turn in range(options.repeats):
            for side, variables in (("nanollm", {}), ("libgomp", AS_LIBGOMP)):
                [quiet] = speeds(work, options.seconds, 1, variables)
                columns.setdefault(f"{side}, quiet", []).append(quiet)
                for others in (1, 2):
                    with busy(others):
                        [beside] = speeds(work, options.seconds, 1, variables)
                    columns.setdefault(f"{side}, beside {others}", []).append(beside / quiet)
                two = speeds(work, options.seconds, 2, variables)
                columns.setdefault(f"{side}, the slower of two at once", []).append(min(two) / quiet)
            told = ", ".join(f"{name} {values[-1]:.3g}" for name, values in columns.items())
            tell(f"{work}, turn {turn + 1} of {options.repeats}: {told}")
        quiet_pairs = zip(columns["nanollm, quiet"], columns["libgomp, quiet"], strict=True)
        columns["nanollm / libgomp, quiet"] = [ours / theirs for ours, theirs in quiet_pairs]
        facts[work] = {name: spread_of(values) for name, values in columns.items()}
    return facts


@contextmanager
def busy(count: int) -> Any:
    """So many processes that never wait, while the block runs."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def speeds(work: str, seconds: float, count: int, variables: dict[str, str]) -> list[float]:
    """Tokens/s of each of `count` processes that do the same at the same time."""
    chosen = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | variables
    begin = time.time() + START_S
    words = [sys.executable, "-m", "benchmarks.shared_cores", work, str(seconds), str(begin)]
    processes = [
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    answers = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(answer) for answer in answers]


def one_process(work: str, seconds: float, begin: float) -> None:
    """Print the tokens/s of some work from a moment on."""
    import nanollm  # noqa: F401, before torch: it chooses how threads wait

    step = {"generate": decoding, "grpo": rollouts}.get(work, lambda: training(work.removeprefix("train ")))()
    step()
    while time.time() < begin:
        step()  # so that all that start together are at work before one is measured
    began, tokens = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        tokens += step()
    print(json.dumps(tokens / elapsed))


def training(preset: str) -> Callable[[], int]:
    """An optimizer step of 4,096 tokens; returns how many there were."""
    import torch

    from nanollm.config import load_preset
    from nanollm.data.batches import Batch
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import train_step
    from nanollm.world import World

    world, optim = World.start(), OptimConfig(lr=3e-3)
    c = ModelConfig(**load_preset("model", preset))
    state = TrainState.start(Transformer(c).init(0), optim, world)
    shape = 4096 // c.context_length, c.context_length + 1
    ids = torch.randint(c.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return lambda: train_step(state, [batch], next_token_loss, 1e-3, optim, world).tokens


def decoding() -> Callable[[], int]:
    """A reply of 64 tokens by nano-20m."""
    from nanollm.config import load_preset
    from nanollm.generate.engine import generate
    from nanollm.generate.sampling import SamplingConfig
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World

    world = World.start()
    model = Transformer(ModelConfig(**load_preset("model", "nano-20m"))).init(0).to(world.dtype).eval()
    prompt = list(range(3, 35))
    return lambda: len(
        generate(model, [prompt], SamplingConfig(temperature=0), max_tokens=64, stop_token_ids=frozenset())[0].ids
    )


def rollouts() -> Callable[[], int]:
    """64 replies of 32 tokens by nano-1m, and an update by as many rows; returns the tokens of both."""
    from nanollm.config import load_preset
    from nanollm.generate.engine import generate
    from nanollm.generate.sampling import SamplingConfig
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World

    world, update = World.start(), training("nano-1m")
    model = Transformer(ModelConfig(**load_preset("model", "nano-1m"))).init(0).to(world.dtype).eval()
    sampling, prompts = SamplingConfig(temperature=1), [[2, *range(9, 30 + row % 5)] for row in range(64)]

    def step() -> int:
        return (
            sum(len(each.ids) for each in generate(model, prompts, sampling, max_tokens=32, stop_token_ids=frozenset()))
            + update()
        )

    return step


if __name__ == "__main__":
    one_process(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
