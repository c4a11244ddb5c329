"""What one GPU does in a quarter of an hour: correctness, decoding, serving, GRPO, training, transformers beside it.

    python benchmarks/run.py gpu --minutes 12 --out FILE

Every part is a process of its own, with a share of the minutes. What it has measured is in FILE after each part, also
where one failed or ran out of time; the next one begins all the same. --tiny runs everything on a CPU, in shapes of no
interest: nothing is to fail of a typo on the day.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.measuring import ROOT, seconds, tell

if TYPE_CHECKING:
    from torch import Tensor

    from nanollm.data.batches import Batch
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World

NEEDS_GPU = True
TESTS_S = 60
WARM_UP = 6  # steps, after which a graph is captured
Facts = Iterator[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: nano-327m, and GRPO in the shape of configs/grpo/nano-327m-gsm8k.yaml."""

    preset: str = "nano-327m"
    rows: tuple[int, ...] = (1, 64, 256, 1024)  # replies decoded at once
    context: int = 512  # tokens in the cache of each
    tokens: int = 64  # decoded and timed
    streams: int = 64
    prompt: int = 200  # tokens, half of it more or less
    reply: int = 128
    serving_s: float = 15.0
    prompts: int = 64  # of a GRPO step
    group: int = 16
    max_tokens: int = 384
    batch: int = 16  # sequences of a step of training
    width: int = 2048  # tokens of each
    steps: int = 10  # of a turn
    repeats: int = 2


TINY = Sizes("nano-1m", (1, 3), 24, 5, 3, 9, 4, 0.5, 2, 3, 5, 2, 32, 1, 1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=12, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file that is written after each part")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, of no interest")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="leave some out")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("this benchmark needs a CUDA device, found none; --tiny runs it on a CPU")
    facts: dict[str, Any] = {}
    share = 60 * options.minutes / sum(PARTS[name][1] for name in options.parts)
    for name in options.parts:
        facts[name] = in_a_process(name, options, share * PARTS[name][1])
        options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def in_a_process(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """What a part has measured when it ends or is ended, and why it did not finish."""
    tell(f"{name}: {limit_s:.0f} s at most")
    beside = options.out.with_suffix(f".{name}.json")
    beside.write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.gpu", name, str(beside), *["--tiny"] * options.tiny]
    started, failure = time.perf_counter(), None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit_s)
        if done.returncode != 0:
            failure = f"ended with status {done.returncode}: {done.stderr.strip()[-1500:]}"
    except subprocess.TimeoutExpired:
        failure = f"stopped after {limit_s:.0f} s"
    facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    beside.unlink()
    if failure is not None:
        tell(f"{name} {failure}")
    return {**facts, "whole_part_s": time.perf_counter() - started} | ({"failure": failure} if failure else {})


# --- inside the process of one part ---


def correctness(z: Sizes) -> Facts:
    """Graph and eager path, engine and whole pass, and the tests that need a GPU."""
    import torch

    world, model, c = ours(z)
    prompts, told = some_prompts(z, c, 4), {}
    for how in HOW:
        with decoding(how):
            told[how] = replies(model, prompts, z.reply)
    graph, eager = ([logprob for _, logprobs in each for logprob in logprobs] for each in told.values())
    apart = [abs(own - other) for own, other in zip(graph, eager, strict=True)]
    same = {how: sum(own[0] == other[0] for own, other in zip(told[how], told["eager"], strict=True)) for how in HOW}
    yield "graph and eager", {"replies of the same ids": same, "greatest difference, nats": max(apart)}
    prompt, ids, logprobs = prompts[0], *told["graph"][0]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]], device=world.device))[0, len(prompt) - 1 : -1]
    own = logits.float().log_softmax(-1).gather(-1, torch.tensor([ids], device=world.device).T)[:, 0]
    differences = (own.cpu() - torch.tensor(logprobs)).abs()
    yield "engine to whole pass, nats", {"mean": differences.mean().item(), "greatest": differences.max().item()}
    if world.device.type == "cuda":
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_S)
        yield "tests", {"status": done.returncode, "end": done.stdout[-2000:]}


def decode(z: Sizes) -> Facts:
    """Tokens/s of rows that decode together, with graphs and without, and where the time of a step goes."""
    from benchmarks.train_gpu import profile

    world, model, _ = ours(z)
    for rows in z.rows:
        for how in HOW:
            with decoding(how):
                facts, step = decoded(z, model, rows)
                yield f"{rows} rows, {how}", facts
                if world.device.type == "cuda" and rows == z.rows[1]:
                    yield f"{rows} rows, {how}, ms by kind", profile(lambda step=step: [step() for _ in range(8)], 8)  # type: ignore[misc]


def fused(z: Sizes) -> Facts:
    """The same with graphs of fused operations: whether it is worth the minute that each takes to compile."""
    import torch

    from nanollm.generate.runner import DecodeStep

    world, model, _ = ours(z)
    backend = "inductor" if world.device.type == "cuda" else "eager"
    compute = torch.compile(DecodeStep.compute, backend=backend, dynamic=False)
    with mock.patch.object(DecodeStep, "compute", compute):
        for rows in z.rows[::2]:
            yield f"{rows} rows", decoded(z, model, rows)[0]


def decoded(z: Sizes, model: "Transformer", rows: int) -> tuple[dict[str, float], Callable[[], float]]:
    """Speed of so many rows, and one more step of them."""
    from nanollm.stages.bench import Decoding

    started = time.perf_counter()
    own = Decoding(model, rows, z.context, 3 * z.tokens, kernels="torch")
    for _ in range(WARM_UP):
        own.step()
    ready = time.perf_counter()
    elapsed = seconds(lambda: [own.step() for _ in range(z.tokens)])
    facts = {"tokens_per_s": rows * z.tokens / elapsed, "ms_per_step": 1e3 * elapsed / z.tokens}
    return facts | {"prompt_and_warm_up_s": ready - started}, own.step


def serving(z: Sizes) -> Facts:
    """Streams that each ask again when their reply has ended: tokens/s, and what they wait for the first token."""
    from nanollm.generate.engine import Engine
    from nanollm.generate.request import Request
    from nanollm.generate.sampling import SamplingConfig

    _, model, c = ours(z)
    engine = Engine(model, rows=z.streams, length=2 * z.prompt + z.reply, kernels="torch")
    prompts, asked_at, waits, tokens = iter(some_prompts(z, c, 10_000)), dict[int, float](), list[float](), 0

    def ask() -> None:
        request = Request(
            prompt=next(prompts), max_tokens=z.reply, sampling=SamplingConfig(temperature=1.0), seed=len(waits)
        )
        asked_at[id(engine.submit(request))] = time.perf_counter()

    for _ in range(z.streams):
        ask()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < z.serving_s:
        for output in engine.step():
            tokens += 1
            if len(output.completion.ids) == 1:
                waits.append(time.perf_counter() - asked_at.pop(id(output.completion)))
            if output.completion.finish is not None:
                ask()
    yield f"{z.streams} streams", {"tokens_per_s": tokens / elapsed, "prompts": len(waits)}
    yield "time to first token, s", {"median": median(waits), "95 %": sorted(waits)[int(0.95 * len(waits))]}


def grpo(z: Sizes) -> Facts:
    """Three steps, each reply of the greatest length; and how often a step waits for the device."""
    import torch

    from nanollm.kernels import attention as fused
    from nanollm.rl.grpo import make_micro_batches, update_policy
    from nanollm.rl.loss import ObjectiveConfig
    from nanollm.rl.rollout import Graded, Group, Rollout
    from nanollm.sources.gsm8k import Problem
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState

    world, model, c = ours(z, is_trained=True)
    optim = OptimConfig(name="adamw", lr=2e-5)
    state, objective = TrainState.start(model, optim, world), ObjectiveConfig()
    is_masked = not fused.serves(*c.head_widths, world.dtype, world.device)
    for step in range(3):
        prompts = some_prompts(z, c, z.prompts, seed=step)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if world.device.type == "cuda" and step == 2:
                torch.cuda.set_sync_debug_mode("warn")
            started = time.perf_counter()
            drawn = replies(state.model, prompts, z.max_tokens, samples=z.group, temperature=1.0)
            sampled, waits = time.perf_counter(), len(told)
            rollouts = [
                Rollout(prompts[number // z.group], ids, logprobs, "length", [True] * len(ids))
                for number, (ids, logprobs) in enumerate(drawn)
            ]
            groups = [rollouts[first : first + z.group] for first in range(0, len(rollouts), z.group)]
            graded = [Graded(Group(Problem("", ""), own), [], []) for own in groups]
            advantages = torch.randn(len(groups), z.group, generator=torch.Generator().manual_seed(step))
            batches = make_micro_batches(
                graded, advantages, objective, z.max_tokens, 12 * c.context_length, is_masked=is_masked
            )
            packed = time.perf_counter()
            update_policy(state, [batches], objective, 1.0, 2e-5, optim, world)
            finished = time.perf_counter()
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        facts = {"rollout_s": sampled - started, "packing_s": packed - sampled, "update_s": finished - packed}
        yield f"step {step}", facts | {"step_s": finished - started, "tokens": sum(len(ids) for ids, _ in drawn)}
    yield "waits for the device in a step", {"rollout": waits, "update": len(told) - waits}
    places = sorted({f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in told})
    yield "waits at", places[:40]


def train(z: Sizes) -> Facts:
    """train_gpu, and the same step on batches that a thread fetches and on those made between the steps."""
    from benchmarks import train_gpu
    from benchmarks.train_step import finish, nanollm, shape_of
    from nanollm.data.batches import Fetcher
    from nanollm.world import World

    options = {"preset": z.preset, "rows": z.batch, "context": z.width, "steps": z.steps, "repeats": z.repeats}
    yield "train_gpu", train_gpu.measured(SimpleNamespace(**options, compile="auto", without_dense=True))  # type: ignore[arg-type]
    world, c = World.start(), shape_of(z.preset, z.width)
    step, source = nanollm(c, world), SimpleNamespace(micro_batches=lambda step, *_, **__: [some_rows(z, c, step)])
    for name, beside in {"fetched by a thread": world, "fetched between the steps": World()}.items():
        fetch = Fetcher(source, z.batch, z.batch, beside)  # type: ignore[arg-type]

        def run(fetch: Fetcher = fetch) -> None:
            for number in range(z.steps):
                step(fetch(number)[0])
            finish(world)

        run()
        yield name, {"tokens_per_s": z.steps * z.batch * z.width / seconds(run)}


def sft(z: Sizes) -> Facts:
    """A step on rows of four texts each, of which none sees another, and on the same rows without a mask."""
    import torch

    from benchmarks.train_step import finish, nanollm, shape_of
    from nanollm.data.batches import Batch
    from nanollm.world import World

    world, c = World.start(), shape_of(z.preset, z.width)
    step, rows = nanollm(c, world), some_rows(z, c, 0)
    positions = (torch.arange(z.width) % (z.width // 4)).expand(z.batch, -1)
    for name, batch in {
        "packed": Batch(rows.tokens, rows.targets, positions),
        "one text per row": rows,
    }.items():

        def run(batch: Batch = batch) -> None:
            for _ in range(z.steps):
                step(batch)
            finish(world)

        run()
        yield name, {"tokens_per_s": z.steps * z.batch * z.width / seconds(run)}


def peers(z: Sizes) -> Facts:
    """transformers with the same weights: `generate`, and a step of training."""
    import torch

    from benchmarks.peers import transformers_twin
    from benchmarks.train_step import finish, shape_of, transformers

    world, model, c = ours(z)
    peer = transformers_twin(model.float()).to(world.device, world.dtype).eval()
    length = {"max_new_tokens": z.tokens, "min_new_tokens": z.tokens}
    for rows in z.rows[:2]:
        ids = torch.randint(c.vocab_size, (1, z.context), device=world.device).expand(rows, -1)

        def run(ids: "Tensor" = ids, peer: Any = peer) -> None:
            peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
            finish(world)

        run()
        yield f"generate, {rows} rows, prompt included", {"tokens_per_s": rows * z.tokens / seconds(run)}
    del model, peer
    step = transformers(shape_of(z.preset, z.width), world)
    ids = torch.randint(c.vocab_size, (z.batch, z.width + 1), device=world.device)
    step(ids)
    elapsed = seconds(lambda: [step(ids) for _ in range(z.steps)])
    yield "training", {"tokens_per_s": z.steps * z.batch * z.width / elapsed}


PARTS: dict[str, tuple[Callable[[Sizes], Facts], float]] = {
    "correctness": (correctness, 1.2),
    "decode": (decode, 1.6),
    "serving": (serving, 0.8),
    "grpo": (grpo, 1.6),
    "train": (train, 1.8),
    "sft": (sft, 1.0),
    "peers": (peers, 1.0),
    "fused": (fused, 3.0),
}
"""What is measured, in this order, and the minutes of twelve that it may take."""


# --- what the parts have in common ---

HOW = ("graph", "eager")


def ours(z: Sizes, *, is_trained: bool = False) -> "tuple[World, Transformer, ModelConfig]":
    """Random weights, in this machine's compute type unless they are trained."""
    from nanollm.config import load_preset
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.world import World

    world, c = World.start(), ModelConfig(**load_preset("model", z.preset))
    model = Transformer(c).init(0).to(world.device)
    return world, model if is_trained else model.to(world.dtype).eval(), c


def decoding(how: str) -> Any:
    """Where no graph can be captured, the same operations run one by one."""
    return nullcontext() if how == "graph" else mock.patch("nanollm.generate.runner.can_capture", lambda model: False)


def some_prompts(z: Sizes, c: "ModelConfig", count: int, seed: int = 0) -> list[list[int]]:
    """Random ids, half as many to half as many again as `prompt`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(z.prompt // 2, 3 * z.prompt // 2, count)
    return [rng.integers(0, c.vocab_size, length).tolist() for length in lengths]


def some_rows(z: Sizes, c: "ModelConfig", seed: int) -> "Batch":
    """A step's rows, as they come from token files."""
    import torch

    from nanollm.data.batches import Batch

    ids = torch.randint(c.vocab_size, (z.batch, z.width + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def replies(
    model: "Transformer", prompts: list[list[int]], max_tokens: int, *, samples: int = 1, temperature: float = 0
) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities of replies that no mark ends."""
    from nanollm.generate.engine import generate
    from nanollm.generate.sampling import SamplingConfig

    how = SamplingConfig(temperature=temperature)
    done = generate(model, prompts, how, max_tokens=max_tokens, stop_token_ids=frozenset(), samples=samples)
    return [(completion.ids, completion.logprobs) for completion in done]


def main(name: str, file: Path, *, is_tiny: bool) -> None:
    facts: dict[str, Any] = {}
    for key, value in PARTS[name][0](TINY if is_tiny else Sizes()):
        facts[key] = value
        tell(f"{key}: {value}")
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(facts), encoding="utf-8")
        beside.replace(file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), is_tiny="--tiny" in sys.argv)
