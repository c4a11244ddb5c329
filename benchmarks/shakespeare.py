"""Loss on Shakespeare's letters after the wall-clock of nanoGPT's README command for CPUs.

The text is tinyshakespeare by characters, the first 90 % to learn from and the rest to be measured on, as nanoGPT
splits it. --nanogpt CHECKOUT runs the command of its README as it stands there ("I only have a macbook"), in a copy of
the checkout; without it the figures recorded on another day count. Our model, of the same family as the presets (latent
attention, SwiGLU, Mixture of Experts), then has as many seconds as that command took, from the start of its process to
the last step, and its learning rate follows the clock. --minutes 8 gives it a clock and a recipe of its own, beside
1.4697, which nanoGPT's README reports of a GPU.

Loss is nats per character over the whole validation split, each character but the first predicted once, in windows of
a model's own context laid end to end; measuring it is outside the clock on our side. nanoGPT prints another figure, a
mean of 20 random batches; both are told. The compile cache is warm: a first process fills an empty one with one step,
and how long that took in both is told.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import (
    ROOT,
    add_data_option,
    compared,
    data_folder,
    matmul_roof,
    model_shapes,
    seconds,
    spread_of,
    tell,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nanollm.data.batches import Batch
    from nanollm.model.config import ModelConfig
    from nanollm.model.transformer import Transformer
    from nanollm.train.optim import OptimConfig
    from nanollm.train.state import TrainState
    from nanollm.train.step import StepStats
    from nanollm.world import World

TEXT = "tinyshakespeare/input.txt"
README_COMMAND = (
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
RECORDED = {"seconds": 104.0, "printed_val_loss": 1.8857}
"""What that command took and printed on the first machine, two cores of an AMD EPYC (Zen 4)."""
GPU_HEADLINE = 1.4697
"""What its README tells of the model of 10 million parameters after three minutes of an A100."""
MOMENTS = 1000
"""The schedule's time in steps of OptimConfig: warm-up and decay are shares of the time, however fast the machine."""
LOOKS = 4
"""Measurements of the validation split, evenly over the clock."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained when the clock decides how long."""

    shape: dict[str, Any]
    """ModelConfig; its context is the length of a window. No preset: a vocabulary of 65 serves nothing else."""
    rows: int
    """Windows of an optimizer step."""
    optim: dict[str, Any]
    """OptimConfig; its steps are thousandths of the schedule's time."""
    is_compiled: bool = True
    """Whether blocks are compiled, which takes some seconds of the clock even with a warm cache."""

    def model_config(self) -> "ModelConfig":
        from nanollm.model.config import ModelConfig

        return ModelConfig(**self.shape)

    def optim_config(self) -> "OptimConfig":
        from nanollm.train.optim import OptimConfig

        return OptimConfig(**self.optim)


FAMILY = {
    "vocab_size": 65,
    "context_length": 256,
    "kv_lora_rank": 64,
    "moe_every": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "experts_per_token": 1,
    "norm_topk_prob": False,
}
RECIPES = {
    "short": Recipe(
        shape=FAMILY | {"d_model": 192, "n_blocks": 4, "n_heads": 3, "q_lora_rank": 96, "d_ff": 512, "d_expert": 256},
        rows=8,
        optim={"lr": 5e-3, "warmup_steps": 30, "balance_rate": 0.01},
    ),
    "long": Recipe(
        shape=FAMILY | {"d_model": 256, "n_blocks": 4, "n_heads": 4, "q_lora_rank": 128, "d_ff": 704, "d_expert": 352},
        rows=8,
        optim={"lr": 5e-3, "warmup_steps": 20, "weight_decay": 0.3, "balance_rate": 0.01},
    ),
}
"""short: for the clock of nanoGPT's command; long: where --minutes sets the clock, for eight minutes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_data_option(parser)
    parser.add_argument("--repeats", type=int, default=1, help="turns; turn n trains ours with seed n - 1")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to run beside", metavar="CHECKOUT")
    parser.add_argument("--minutes", type=float, help="how long ours trains (default: as long as nanoGPT's command)")
    parser.add_argument("--recipe", choices=list(RECIPES), help="default: long with --minutes, else short")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from nanollm.world import World

    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    text_file = data_folder(options, TEXT) / TEXT
    text = split(text_file.read_text(encoding="utf-8"))
    name = options.recipe or ("short" if options.minutes is None else "long")
    r, dtype = RECIPES[name], World.start("cpu").dtype
    c = r.model_config()
    theirs: list[dict[str, float]] = []
    ours: list[dict[str, Any]] = []
    roofs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cold = in_a_process(text_file, cache, recipe=name, clock_s=None, seed=0)
        tell(f"first step with an empty compile cache after {cold['first_step_s']:.1f} s")
        for turn in range(options.repeats):
            theirs.append(run_nanogpt(options.nanogpt, text_file, Path(folder)) if options.nanogpt else dict(RECORDED))
            tell(f"turn {turn + 1}, nanoGPT: " + ", ".join(f"{name} {value:.5g}" for name, value in theirs[-1].items()))
            clock_s = theirs[-1]["seconds"] if options.minutes is None else options.minutes * 60
            roofs.append(matmul_roof(model_shapes(c, r.rows * c.context_length), dtype))
            ours.append(in_a_process(text_file, cache, recipe=name, clock_s=clock_s, seed=turn))
            tell(f"turn {turn + 1}, nanollm: val loss {ours[-1]['val_loss']:.4f} after {ours[-1]['seconds']:.1f} s")

    their_loss = "val_loss" if options.nanogpt else "printed_val_loss"
    flops = c.training_flops_per_token()
    return {
        "unit": "nats per character",
        **compared(
            {"nanoGPT": [each[their_loss] for each in theirs], "nanollm": [each["val_loss"] for each in ours]},
        ),
        "nanogpt": {"ran_here": options.nanogpt is not None, **columns(theirs), "printed_on_a_gpu": GPU_HEADLINE},
        "nanollm": {
            "recipe": name,
            "shape": r.shape,
            "settings": {"rows": r.rows, "dtype": str(dtype), "compiled": r.is_compiled, **r.optim},
            "parameters": c.total_parameters,
            "active_parameters": c.active_parameters,
            **columns([{key: each[key] for key in NUMBERS} for each in ours]),
            "first_step_s_with_empty_cache": cold["first_step_s"],
            "curve": ours[0]["curve"],
        },
        "roof": {"matmul_gflop_per_s": spread_of(roofs)},
        "share_of_matmul_roof": spread_of(
            [each["characters_per_s"] * flops / 1e9 / roof for each, roof in zip(ours, roofs, strict=True)]
        ),
        "flops_per_character": flops,
        "checks": {
            "vocabulary": text.vocabulary,
            "train_characters": len(text.train),
            "val_characters": len(text.val),
            "predicted": ours[0]["predicted"],
            "same": all(each.get("predicted", ours[0]["predicted"]) == ours[0]["predicted"] for each in theirs),
            "within_the_clock": all(
                each["seconds"] <= (their["seconds"] if options.minutes is None else options.minutes * 60)
                for each, their in zip(ours, theirs, strict=True)
            ),
            "torch_threads": torch.get_num_threads(),
        },
    }


NUMBERS = ("seconds", "val_loss", "train_loss", "steps", "characters", "characters_per_s", "first_step_s")


def columns(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Each number of all turns as a spread."""
    return {name: spread_of([row[name] for row in rows]) for name in rows[0]}


# --- the text ---


@dataclass(frozen=True)
class Characters:
    """Ids of a text's characters, the first nine tenths apart from the rest."""

    vocabulary: int
    train: "Tensor"  # (N,) int64
    val: "Tensor"  # (M,) int64


def split(text: str) -> Characters:
    """As nanoGPT's data/shakespeare_char/prepare.py does it: characters by their code points, split in order."""
    import torch

    ids_of = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([ids_of[character] for character in text])
    cut = int(len(ids) * 0.9)
    return Characters(len(ids_of), ids[:cut], ids[cut:])


def windows(ids: "Tensor", context: int, rows: int, seed: int) -> Iterator["Batch"]:
    """Batches without end. Every pass over the text lays windows end to end from another place, in another order."""
    import torch

    from nanollm.data.batches import Batch

    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, context + 1, dtype=torch.int64)
    while True:
        shift = int(torch.randint(min(context, len(ids) - context), (), generator=generator))
        laid = ids[shift:].unfold(0, context + 1, context)  # (windows, context + 1)
        waiting = torch.cat((waiting, laid[torch.randperm(len(laid), generator=generator)]))
        while len(waiting) >= rows:
            batch, waiting = waiting[:rows], waiting[rows:]
            yield Batch(batch[:, :-1], batch[:, 1:])


def loss_per_character(model: "Transformer", ids: "Tensor", rows: int = 64) -> float:
    """Mean loss in nats of all characters but the first, each predicted once."""
    import torch

    from nanollm.train.loss import cross_entropy_sum

    context, total, predicted = model.config.context_length, 0.0, 0
    laid = ids.unfold(0, context + 1, context) if len(ids) > context else ids.new_empty(0, context + 1)
    rest = ids[len(laid) * context :]
    # Not compiled: a pass without gradients would be compiled for itself, and again for each number of rows.
    with torch.no_grad(), model.evaluating(), torch.compiler.set_stance("force_eager"):
        for part in [*laid.split(rows), rest[None]] if len(rest) > 1 else laid.split(rows):
            total += cross_entropy_sum(model.head, model.trunk(part[:, :-1]), part[:, 1:]).item()
            predicted += part[:, 1:].numel()
    assert predicted == len(ids) - 1
    return total / predicted


# --- ours, in a process of its own ---


def in_a_process(text_file: Path, cache: Path, **asked: Any) -> dict[str, Any]:
    """What `ours` says, in a process whose clock runs from before it begins."""
    words = [str(text_file.resolve()), json.dumps(asked), repr(time.time())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.shakespeare", *words],
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"our side ended with status {done.returncode}; its last words stand above")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def ours(text_file: Path, started: float, *, recipe: str, clock_s: float | None, seed: int) -> dict[str, Any]:
    """Train until `clock_s` seconds after `started` (time.time()), and measure; None: take one step."""
    from nanollm.world import World

    text = split(text_file.read_text(encoding="utf-8"))
    r = RECIPES[recipe]
    state = start(r, seed, World.start("cpu"))
    batches = windows(text.train, r.shape["context_length"], r.rows, seed)
    if clock_s is None:
        take_step(state, next(batches), r.optim_config(), share=0.0)
        return {"first_step_s": time.time() - started}
    look = partial(loss_per_character, state.model, text.val)
    facts = train(state, batches, r.optim_config(), Clock(started, clock_s), look)
    return facts | {"val_loss": look(), "predicted": len(text.val) - 1}


def start(r: Recipe, seed: int, world: "World") -> "TrainState":
    """A model before its first step, as `nanollm pretrain --start fast` begins."""
    import torch

    from nanollm.model.transformer import Transformer
    from nanollm.stages.pretrain import UNIT_ROWS
    from nanollm.train.compile import SpeedConfig, compile_blocks
    from nanollm.train.state import TrainState

    model = Transformer(r.model_config()).init(seed, "fast")
    compile_blocks(model, SpeedConfig(compile="on" if r.is_compiled else "off"), torch.device("cpu"))
    return TrainState.start(model, r.optim_config(), world, UNIT_ROWS["fast"])


class Clock:
    """Seconds since the start, but for what is measured with the clock stopped."""

    def __init__(self, started: float, limit_s: float, now: Callable[[], float] = time.time) -> None:
        self.started, self.limit_s, self.now = started, limit_s, now

    def read(self) -> float:
        return self.now() - self.started

    def stopped(self, work: Callable[[], float]) -> float:
        begun = self.now()
        outcome = work()
        self.started += self.now() - begun
        return outcome


def train(
    state: "TrainState",
    batches: Iterator["Batch"],
    optim: "OptimConfig",
    clock: Clock,
    look: Callable[[], float],
) -> dict[str, Any]:
    """Steps until the clock has no room for another one; what it has left after the first step is the schedule's time.

    `look` measures the validation split when each of LOOKS parts of that time is over, with the clock stopped.
    """
    stats = [take_step(state, next(batches), optim, share=0.0)]  # compiles
    first_step_s = before = now = clock.read()
    if now >= clock.limit_s:
        raise ValueError(f"the first step ended after {now:.1f} s and the clock is {clock.limit_s:.1f} s; give it more")
    curve: list[dict[str, float]] = []
    while now + (now - before) <= clock.limit_s:
        before, share = now, (now - first_step_s) / (clock.limit_s - first_step_s)
        if share * LOOKS >= len(curve) + 1:
            curve.append({"seconds": now, "characters": characters_in(stats), "val_loss": clock.stopped(look)})
            tell(", ".join(f"{name} {value:.5g}" for name, value in curve[-1].items()))
        stats.append(take_step(state, next(batches), optim, share))
        now = clock.read()
    last = [each.loss for each in stats[-20:]]
    return {
        "seconds": now,
        "first_step_s": first_step_s,
        "steps": len(stats),
        "characters": characters_in(stats),
        "characters_per_s": characters_in(stats[1:]) / (now - first_step_s),
        "train_loss": sum(last) / len(last),
        "curve": curve,
    }


def take_step(state: "TrainState", batch: "Batch", optim: "OptimConfig", share: float) -> "StepStats":
    """One optimizer step when `share` of the schedule's time is over."""
    from nanollm.train.loss import next_token_loss
    from nanollm.train.optim import lr_at
    from nanollm.train.step import train_step
    from nanollm.world import World

    lr = lr_at(int(share * MOMENTS), MOMENTS, optim)
    return train_step(state, [batch], next_token_loss, lr, optim, World())


def characters_in(stats: "list[StepStats]") -> int:
    return sum(each.tokens for each in stats)


# --- nanoGPT, as its README says ---

WHOLE_VAL_LOSS = """
import json, numpy, sys, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(numpy.fromfile("data/shakespeare_char/val.bin", dtype=numpy.uint16).astype(numpy.int64))
context, total = saved["model_args"]["block_size"], 0.0
with torch.no_grad():
    for begin in range(0, len(ids) - 1, context):
        part = ids[begin : begin + context + 1]
        total += model(part[None, :-1], part[None, 1:])[1].item() * (len(part) - 1)
print(json.dumps({"val_loss": total / (len(ids) - 1), "predicted": len(ids) - 1}))
"""
"""The mean loss of a checkpoint of nanoGPT as `loss_per_character` takes it; runs among nanoGPT's files."""


def run_nanogpt(checkout: Path, text_file: Path, folder: Path) -> dict[str, float]:
    """Seconds of the README's command, the loss it printed last, and the loss of its checkpoint on the whole split.

    The checkout is copied into `folder` and stays as it is. Raises ValueError if it is none, or if its command fails.
    """
    if not (checkout / "train.py").exists() or not (checkout / "config" / "train_shakespeare_char.py").exists():
        raise ValueError(
            f"--nanogpt {checkout} is no checkout of nanoGPT: there is no config/train_shakespeare_char.py"
        )
    copied = Path(tempfile.mkdtemp(dir=folder)) / "nanoGPT"
    shutil.copytree(checkout, copied, ignore=shutil.ignore_patterns(".git", "out-*"))
    shutil.copyfile(text_file, copied / "data" / "shakespeare_char" / "input.txt")
    among(copied, "data/shakespeare_char/prepare.py")
    printed: list[str] = []
    elapsed = seconds(lambda: printed.append(among(copied, *README_COMMAND)))
    estimates = re.findall(r"^step \d+: .*val loss ([\d.]+)", printed[0], re.MULTILINE)
    if not estimates:
        raise ValueError(f"nanoGPT's command printed no `val loss`: {printed[0][-300:]}")
    checkpoint = copied / "out-shakespeare-char" / "ckpt.pt"
    whole = json.loads(among(copied, "-c", WHOLE_VAL_LOSS, str(checkpoint)).splitlines()[-1])
    return {"seconds": elapsed, "printed_val_loss": float(estimates[-1]), **whole}


def among(folder: Path, *words: str) -> str:
    """What Python prints in a folder. Raises ValueError with its last words if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"nanoGPT's {words[0]} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


if __name__ == "__main__":
    print(json.dumps(ours(Path(sys.argv[1]), float(sys.argv[3]), **json.loads(sys.argv[2]))))
