"""The ladder: small models trained on one text, and the scaling law that predicts the loss of larger ones from them.

Each run has its own linear decay and its own batch: that is what pretrain does, and what is predicted. The mean of
checkpoints at a constant rate would give several lengths for the price of one, but with the batch of only one of them.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from markupsafe import Markup

from nanollm.config import load_preset, parse_options, plain
from nanollm.data.shards import read_manifest
from nanollm.durable import check_writable, lock_folder, read_json, write_json
from nanollm.model.config import ModelConfig
from nanollm.progress import duration, say
from nanollm.report.charts import Series, line_chart
from nanollm.report.folder import read_run
from nanollm.report.page import PAGE, Chart, keys, write_page
from nanollm.stages import plan, pretrain
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.metrics import read_metrics
from nanollm.train.scaling import LEVEL, MAX_EPOCHS, MIN_SIZES, Ladder, Law, seconds_of, seen

SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "nano-500k": (
        "nano-1m",
        {"d_model": 64, "n_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 32, "d_ff": 128, "d_expert": 64},
    ),
    "nano-1m": ("nano-1m", {}),
    "nano-2m": ("nano-1m", {"d_model": 192, "n_heads": 6, "q_lora_rank": 48, "d_ff": 384, "d_expert": 192}),
    "nano-5m": ("nano-5m", {}),
    "nano-10m": ("nano-20m", {"d_model": 256, "n_heads": 4, "q_lora_rank": 64, "d_ff": 704, "d_expert": 352}),
    "nano-20m": ("nano-20m", {}),
}
"""Presets, and what lies between them; all with the tokenizer's pieces."""
PARTS = (1 / 9, 1 / 3, 1)
"""Of the tokens of a size's longest run: those of its runs."""
LONGEST = 1_800_000
"""Tokens of the longest run at least: in less than a ninth of it the warm-up would decide."""
CURVE = 50


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train small models on one text, as many sizes as the budget allows, each for three numbers of tokens, and fit
    the scaling law by which plan and pretrain --budget predict the loss. The same command resumes."""

    data: Path
    """Folder of token files with validation text, as nanollm preprocess makes it."""
    tokenizer_path: Path
    """The tokenizer the token files were written with: a .model file or its folder."""
    budget: str
    """Time for all runs together, such as 30m or 2h."""
    out: Path = Path("runs/scale")
    """Folder of the ladder: scale.json, a JSON file and a folder for each run, report.html."""
    models: list[str] = field(default_factory=lambda: list(SIZES))
    """Sizes from the smallest to the largest, at least three: of these names, presets or YAML files."""
    context_length: int = 512
    """Context of all runs, in tokens."""
    seed: int = 0
    """Random seed of the runs."""

    def __post_init__(self) -> None:
        seconds_of(self.budget)
        if len(names := {Path(name).stem for name in self.models}) < max(MIN_SIZES, len(self.models)):
            raise ValueError(f"models: expected at least {MIN_SIZES} different names, got {' '.join(sorted(names))}")


def run(c: Config) -> Path:
    """Do what is not done yet; returns scale.json."""
    check_writable(c.out, "--out")
    path = c.out / "scale.json"
    with lock_folder(c.out):
        ladder = begin(c, path)
        for one in ladder["runs"]:
            own = c.out / f"{one['name']}.json"
            if not own.exists():
                say(f"\n{one['name']}: {one['parameters']:,} parameters, {one['tokens']:,} tokens")
                pretrain.run(config_of(c, one["name"], ModelConfig(**one["model"]), one["options"]))
                last = read_metrics(c.out / one["name"])[-1]
                write_json(own, one | {"val_bpb": last["val_bpb"]})
            one |= read_json(own)
            write_json(path, ladder)
        conclude(c, ladder)
        write_json(path, ladder)
    return path


# --- which runs ---


def begin(c: Config, path: Path) -> dict[str, Any]:
    """The ladder that was begun in this folder with these settings, or a new one."""
    settings = {name: value for name, value in plain(c).items() if name != "out"}
    if path.exists():
        ladder = read_json(path)
        if ladder["settings"] != settings:
            raise ValueError(f"{c.out} holds a ladder with {ladder['settings']}; choose another --out")
        return ladder
    splits = read_manifest(c.data)[0]["splits"]
    if not splits.get("val", {}).get("tokens"):
        raise ValueError(f"{c.data} has no validation text to measure on (nanollm preprocess --val_input FILE)")
    if (text := splits["train"]["tokens"]) * MAX_EPOCHS < LONGEST:
        raise ValueError(
            f"{c.data} has {text:,} tokens: too few for a ladder, whose sizes see {LONGEST:,} in at most {MAX_EPOCHS} "
            f"epochs; give it {LONGEST // MAX_EPOCHS:,}"
        )
    ladder = {"settings": settings, "text_tokens": text, "runs": list(planned(c, text))}
    write_json(path, ladder)
    return ladder


def planned(c: Config, text: int) -> Iterator[dict[str, Any]]:
    """The runs of as many sizes as the budget allows, each with the same time. ValueError: too few."""
    began, seconds = time.monotonic(), seconds_of(c.budget)
    vocab_size, machine = Tokenizer.load(c.tokenizer_path).vocab_size, plan.this_machine()
    timed: list[tuple[str, ModelConfig, float, float]] = []
    least, left = 0.0, 0.0  # seconds that a size needs, and that are left for all
    for name in c.models:
        preset, changes = SIZES.get(name, (name, {}))
        more = {"vocab_size": vocab_size, "context_length": c.context_length}
        m = ModelConfig(**load_preset("model", preset) | changes | more)
        say(f"measuring how fast {name} trains here")
        trial = plan.recipe(m, machine, plan.good_batch_size(m, LONGEST), LONGEST)
        rate, rest_s = pretrain.measure(config_of(c, "trial", m, trial), plan.tokens_per_s(m, machine) or 0.0)
        least = max(least, LONGEST * sum(PARTS) / rate + len(PARTS) * rest_s)
        left = 0.95 * seconds - (time.monotonic() - began)
        if len(timed) >= MIN_SIZES and least * (len(timed) + 1) > left:
            say(f"{name} is left out, and what is larger: {len(timed) + 1} sizes take {duration(least)} each")
            break
        timed.append((name, m, rate, len(PARTS) * rest_s))
        if len(timed) == MIN_SIZES and least * MIN_SIZES > left:
            needed = math.ceil((least * MIN_SIZES + time.monotonic() - began) / 0.95 / 60)
            raise ValueError(f"--budget {c.budget} is too small: {MIN_SIZES} sizes take {needed}m here")
    for name, m, rate, rest_s in timed:
        longest = min(rate * (left / len(timed) - rest_s) / sum(PARTS), MAX_EPOCHS * text)
        say(f"{name}: {rate:,.0f} tokens/s, up to {longest:,.0f} tokens ({longest / text:.2f} epochs of the text)")
        for part in PARTS:
            tokens = longest * part
            options = plan.recipe(m, machine, plan.good_batch_size(m, tokens), tokens)
            tokens = options["train.steps"] * options["train.batch_size"] * m.context_length
            yield {
                "name": f"{Path(name).stem}-{tokens}",
                "parameters": m.multiplied_parameters,
                "tokens": tokens,
                "seen": seen(tokens, text),
                "val_bpb": None,
                "model": asdict(m),
                "options": options,
            }


def config_of(c: Config, name: str, m: ModelConfig, options: Mapping[str, Any]) -> pretrain.Config:
    """A run of the ladder in the words of pretrain."""
    paths = {"data": c.data, "tokenizer_path": c.tokenizer_path, "out": c.out / name}
    quiet = {"seed": c.seed, "sample_prompts": "none", "train.validate_every": 0, "train.keep_last": 1}
    words = [f"--{option}={plain(value)}" for option, value in {**paths, **quiet, **options}.items()]
    config, _ = parse_options("pretrain", pretrain, [f"--model={json.dumps(asdict(m))}", *words])
    return cast(pretrain.Config, config)


# --- what they say ---


def conclude(c: Config, ladder: dict[str, Any]) -> None:
    """Add the law to the ladder, or the reason why there is none, and write the page."""
    known = Ladder.read(c.out / "scale.json")
    law = None
    try:
        law = known.law
        ladder["law"] = law.best()
        say("bits per byte = {E:.3f} + {A:.4g} / N^{alpha:.2f} + {B:.4g} / D^{beta:.2f}".format(**law.best()))
    except ValueError as reason:
        ladder["law"] = {"unknown": str(reason)}
        say(f"no law: {reason}")
    longest = {one["parameters"]: one["name"] for one in ladder["runs"]}  # the last of each size
    page, runs = c.out / PAGE, [read_run(c.out / name) for name in longest.values()]
    write_page(page, runs, Scaling=[chart(ladder["runs"], law)])
    say(f"as a page: {page}")


def chart(runs: Sequence[Mapping[str, Any]], law: Law | None) -> Chart:
    """What was measured and, as bands, what the law says of each size up to ten times its tokens."""
    lines, names = [], []
    for look, (parameters, group) in enumerate(groupby(runs, key=lambda one: one["parameters"])):
        own, name = list(group), f"{parameters:,} parameters"
        ys = [one["val_bpb"] for one in own]
        xs = [math.log10(one["seen"]) for one in own]
        names.append(name)
        lines.append(Series(name=name, xs=xs, ys=ys, look=look))
        if law is not None:
            xs = np.linspace(xs[0], xs[-1] + 1, CURVE).tolist()
            expected = [law.expect(parameters, 10**x) for x in xs]
            lows, highs = [each.low for each in expected], [each.high for each in expected]
            lines.append(
                Series(name=name, xs=xs, ys=[each.value for each in expected], look=look, lows=lows, highs=highs)
            )
    unit = "bits per byte"
    return Chart(
        title="Validation",
        unit=unit,
        about=f"Points: runs. Bands: the law, {LEVEL:.0%} of runs.",
        picture=Markup(line_chart("Validation", unit, lines, x_unit="log10 of tokens", log=True)),
        keys=keys(names),
        columns=["parameters", "tokens", unit],
        rows=[[f"{one['parameters']:,}", f"{one['tokens']:,}", f"{one['val_bpb']:.4f}"] for one in runs],
    )
