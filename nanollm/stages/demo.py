"""The whole journey on text that is already on this machine: what does it look like when everything works?"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollm import settings
from nanollm.durable import write_json
from nanollm.model.config import ModelConfig
from nanollm.progress import duration, say
from nanollm.sources.builtin import BUILTIN
from nanollm.stages import preprocess, pretrain, tokenizer
from nanollm.train.loop import TrainConfig
from nanollm.train.optim import OptimConfig
from nanollm.train.runlog import read_metrics

TOKENS_PER_STEP = 4096
PROMPTS = ["Return the", "The function", "This module", "If the argument is"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a tokenizer and a small model on this machine's own documentation: offline, two CPU cores, minutes."""

    out: Path = Path("runs/demo")
    """Folder for everything that is made. An interrupted demo goes on there."""
    model: str = "nano-1m"
    """Preset of the model."""
    steps: int = 500
    """Optimizer steps of pretraining, 4,096 tokens each."""
    seed: int = 0
    """Starts the weights and the order of the data."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Step:
    """One step of the journey, its name in summary.json, and the work."""

    name: str
    title: str
    work: Callable[[], Path]


def run(c: Config) -> Path:
    """Do what is not done yet; returns summary.json."""
    model = ModelConfig(**settings.load_preset("model", c.model))
    path = c.out / "summary.json"
    summary = begin(c, path)
    steps = journey(c, model)
    for number, step in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {step.title}")
        if Path(summary["made"].get(step.name, "")).exists() and step.name in summary["made"]:
            say(f"done before, in {duration(summary['seconds'][step.name])}")
            continue
        started = time.monotonic()
        try:
            summary["made"][step.name] = step.work().as_posix()
        finally:  # the seconds of a stopped step count too
            spent = summary["seconds"].get(step.name, 0) + time.monotonic() - started
            summary["seconds"][step.name] = round(spent, 1)
            write_json(path, summary)
    summary["pretrain"] = outcome(c.out / "pretrain")
    write_json(path, summary)
    say(farewell(c, summary))
    return path


def begin(c: Config, path: Path) -> dict[str, Any]:
    """The summary of an earlier demo in the same folder with the same settings, or an empty one."""
    chosen = {"model": c.model, "steps": c.steps, "seed": c.seed}
    if not path.exists():
        c.out.mkdir(parents=True, exist_ok=True)
        return {"settings": chosen, "seconds": {}, "made": {}}
    summary: dict[str, Any] = json.loads(path.read_bytes())
    if summary["settings"] != chosen:
        raise ValueError(
            f"{c.out} holds a demo with {summary['settings']}, this one has {chosen}; choose another --out"
        )
    return summary


def journey(c: Config, model: ModelConfig) -> list[Step]:
    """The steps, each a verb that a user can call alone."""
    tokens = c.out / "tokens"
    learn = tokenizer.Config(corpus=[BUILTIN], output_dir=c.out / "tokenizer", vocab_size=model.vocab_size, seed=c.seed)
    encode = preprocess.Config(
        kind="text", input=[Path(BUILTIN)], tokenizer_path=learn.model_path, save_dir=tokens, seed=c.seed
    )
    train = pretrain.Config(
        model=model,
        tokenizer_path=learn.model_path,
        data=tokens,
        out=c.out / "pretrain",
        train=TrainConfig(
            steps=c.steps,
            batch_size=max(1, TOKENS_PER_STEP // model.context_length),
            micro_batch_size=max(1, TOKENS_PER_STEP // model.context_length),
            validate_every=max(1, c.steps // 7),
            save_every=max(1, c.steps // 7),
        ),
        optim=OptimConfig(lr=1.5e-2, warmup_steps=c.steps // 20, balance_rate=0.01),
        seed=c.seed,
        sample_prompts=PROMPTS,
    )
    return [
        Step("tokenizer", f"a tokenizer of {model.vocab_size:,} pieces", lambda: tokenizer.run(learn)),
        Step("preprocess", "the corpus as token files", lambda: preprocess.run(encode)),
        Step(
            "pretrain", f"{c.model}: {model.total_parameters:,} parameters learn to write", lambda: pretrain.run(train)
        ),
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """Bits per byte before and after, and the samples of both moments."""
    lines = read_metrics(folder)
    first, last = lines[0], lines[-1]
    rates = sorted(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return {
        "val_bpb_before": first["val_bpb"],
        "val_bpb_after": last["val_bpb"],
        "tokens_per_s": rates[len(rates) // 2],
        "prompts": PROMPTS,
        "samples_before": first["samples"],
        "samples_after": last["samples"],
    }


def farewell(c: Config, summary: dict[str, Any]) -> str:
    """What was reached, what the model writes now, and what to type next."""
    learned, seconds = summary["pretrain"], sum(summary["seconds"].values())
    lines = ["", "The model continues a text it has never seen:"]
    for prompt, before, after in zip(PROMPTS, learned["samples_before"], learned["samples_after"], strict=True):
        lines += [f"  before  {_shorten(prompt + before)}", f"  after   {_shorten(prompt + after)}", ""]
    bundle = c.out / "pretrain" / "bundle"
    nanollm = "nanollm" if shutil.which("nanollm") else f"{sys.executable} -m nanollm"
    lines += [
        f"Bits per byte of unseen text: {learned['val_bpb_before']:.2f} before, {learned['val_bpb_after']:.2f} after, "
        f"in {duration(seconds)}.",
        f'Next:  {nanollm} generate {bundle} --prompt "The function returns"',
        f"       {nanollm} info {c.model}",
        "       and the road to the 327M model in README.md",
    ]
    return "\n".join(lines)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 110 else line[:107] + "..."
