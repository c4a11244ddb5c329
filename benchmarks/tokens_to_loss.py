"""Tokens that `fast` needs for the loss that AdamW with cosine decay reaches in ten minutes at nano-5m.

The baseline trains for --minutes (its steps follow from a short timing, so that the cosine ends there), with the
learning rate and batch that were best for it. Then `fast` trains anew with 1/1.6 and with 1/2.2 of those tokens, its
schedule planned for that many. A ratio holds where its final validation loss is at or below the baseline's. Same model,
text, tokenizer, windows in the same order, validation (the whole split) and machine.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import tell
from benchmarks.trial import CORPUS, PREPARED, Run, Text, prepare

if TYPE_CHECKING:
    from benchmarks.variants import Variant
    from nanollm.world import World

WARM_UP, TIMED = 3, 8  # steps of the timing


def recipes() -> "tuple[Variant, Variant]":
    """The baseline and ours: rows of the ablations, for a run that is some ten times longer."""
    from benchmarks.variants import ROWS

    adamw, fast = ROWS["adamw"], ROWS["fast"]
    baseline = dataclasses.replace(adamw.optim, lr=2e-3, warmup_steps=100)
    ours = dataclasses.replace(fast.optim, lr=2e-3, warmup_steps=20)
    return (
        dataclasses.replace(adamw, optim=baseline, batch_size=2),  # windows
        dataclasses.replace(fast, optim=ours, batch_size=2),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of the baseline")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.6, 2.2], help="how many times fewer tokens")
    parser.add_argument("--preset", default="nano-5m")
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation_windows", type=int, default=None, help="default: the whole split")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="text to train on, as Parquet of OpenWebText")
    parser.add_argument("--prepared", type=Path, default=PREPARED, help="folder of tokenizer-N and owt-N")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from nanollm.world import World

    adamw, fast = recipes()
    prepare(options.corpus, options.prepared, adamw.pieces)
    world = World.start("cpu")
    text = Text.open(options.prepared, adamw.pieces)
    seconds = step_seconds(adamw, options, text, world)
    steps = max(1, round(options.minutes * 60 / seconds))
    tell(f"{seconds:.3f} s per step of the baseline: {steps} steps in {options.minutes:g} minutes")
    baseline = trained(adamw, steps, options, text, world)
    tokens_per_step = fast.batch_size * options.context_length
    ours = [
        trained(fast, int(baseline["tokens"] / ratio / tokens_per_step), options, text, world)
        for ratio in options.ratios
    ]
    names = [f"fast, 1/{ratio:g} of the tokens" for ratio in options.ratios]
    sides = {"adamw": baseline, **dict(zip(names, ours, strict=True))}
    return {
        "nats_per_token": {name: side["nats_per_token"] for name, side in sides.items()},
        "holds": {
            f"{ratio:g} x fewer tokens": side["nats_per_token"] <= baseline["nats_per_token"]
            for ratio, side in zip(options.ratios, ours, strict=True)
        },
        "runs": sides,
        "checks": {
            "parameters are equal": len({side["parameters"] for side in sides.values()}) == 1,
            "fast reads no more tokens than it may": all(
                side["tokens"] * ratio <= baseline["tokens"] for ratio, side in zip(options.ratios, ours, strict=True)
            ),
        },
    }


def step_seconds(v: "Variant", options: argparse.Namespace, text: Text, world: "World") -> float:
    """How long a step takes, after the first ones."""
    run = started(v, options, text, world)
    for step in range(WARM_UP):
        run.step(step, WARM_UP + TIMED)
    begun = time.perf_counter()
    for step in range(WARM_UP, WARM_UP + TIMED):
        run.step(step, WARM_UP + TIMED)
    return (time.perf_counter() - begun) / TIMED


def started(v: "Variant", options: argparse.Namespace, text: Text, world: "World") -> Run:
    from nanollm.config import load_preset

    config = v.config(load_preset("model", options.preset), options.context_length)
    return Run.start(v, config, options.seed, text, world)


def trained(v: "Variant", steps: int, options: argparse.Namespace, text: Text, world: "World") -> dict[str, Any]:
    """A run of `steps` with its schedule, measured at its end."""
    if steps < 1:
        raise ValueError(f"--minutes {options.minutes:g} leaves no step to one side; take more")
    run = started(v, options, text, world)
    begun = time.perf_counter()
    for step in range(steps):
        stats = run.step(step, steps)
        if (step + 1) % max(1, steps // 20) == 0:
            tell(f"{v.about}: step {step + 1} of {steps}, loss {stats.loss:.3f}")
    elapsed = time.perf_counter() - begun
    score = run.validate(options.validation_windows)
    tell(f"{v.about}: validation {score.nats / score.tokens:.4f} nats per token after {elapsed:.0f} s")
    return {
        "about": v.about,
        "tokens": steps * v.batch_size * options.context_length,
        "steps": steps,
        "tokens_per_step": v.batch_size * options.context_length,
        "lr": v.optim.lr,
        "nats_per_token": score.nats / score.tokens,
        "bits_per_byte": score.value,
        "seconds": elapsed,
        "parameters": run.state.model.config.total_parameters,
    }
