"""The charts of docs/concepts, drawn by matplotlib from measured figures: `python docs/figures/draw.py [--check]`.

What is drawn is in measured/*.json (each file names the commit whose docs/figures/measure.py wrote it), in
benchmarks/results, and in the presets. --check names the charts that differ from the committed ones.
architecture.svg, flow.svg, demo.svg (rich's export_svg of a demo's last lines) and the PNG files are not drawn here.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nanollm.config import load_preset  # noqa: E402
from nanollm.model.config import ModelConfig  # noqa: E402
from nanollm.rl.loss import ObjectiveConfig, surrogate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PRESETS = ("nano-1m", "nano-5m", "nano-20m", "nano-60m", "nano-327m", "nano-327m-fine")
BLUE, ORANGE, GREEN, PURPLE, GREY = SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f")  # Okabe and Ito
INK, GROUND, GRID = "#1f2328", "#fffffe", "#d8dee4"  # colours that follow the reader's scheme, and what they turn into
DARK = {INK: "#e6edf3", GROUND: "#0d1117", GRID: "#2d333b"}
HABITS = {
    "first": "the first token",
    "before": "the token before",
    "itself": "the token itself",
    "repeat": "behind a repetition",
}
mpl.rcParams.update(
    {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "grid.color": GRID,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.prop_cycle": mpl.cycler(color=SERIES),
        "svg.fonttype": "none",
        "svg.hashsalt": "nanollm",
    }
)


def measured(name: str) -> Any:
    return json.loads((HERE / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def panels(rows: int, columns: int, height: float, facts: Mapping[str, Any] | None = None, **how: Any) -> Any:
    """A figure 7.5 inches wide and its axes; below them, which model was measured."""
    figure = Figure((7.5, height), layout="constrained")
    if facts:
        learnt = f" after {facts['tokens_seen'] / 1e6:.1f} million tokens" if facts["tokens_seen"] else ""
        figure.supxlabel(f"{facts['model']}{learnt}, commit {facts['commit']}", size=7)
    return figure, figure.subplots(rows, columns, **how)


def label(axes: Axes, title: str, x: str, y: str, **limits: Any) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, **limits)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over a window of that many values, cut off at both ends."""
    half = width // 2
    return [fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def heat_map(axes: Axes, shares: Sequence[Sequence[float]], size: float) -> None:
    """A square for each share, so opaque as it is large; rows from the top, as in a matrix."""
    cells = [(x + 0.5, y + 0.5, share) for y, row in enumerate(shares) for x, share in enumerate(row) if share >= 0.005]
    xs, ys, alphas = zip(*cells, strict=True)
    axes.scatter(xs, ys, s=size**2, marker="s", lw=0, color=[(*mpl.colors.to_rgb(BLUE), min(1, a)) for a in alphas])
    axes.set(xlim=(0, len(shares[-1])), ylim=(len(shares), 0))
    axes.grid(visible=False)


# --- docs/concepts/architecture.md ---


def parameters() -> Figure:
    """Of each preset the share of its parameters in each part; the router counts to the experts."""
    figure, axes = panels(1, 1, 3.0)
    for row, name in enumerate(PRESETS):
        c, left = ModelConfig(**load_preset("model", name)), 0.0
        idle = c.n_moe_blocks * (c.n_routed_experts - c.experts_per_token) * c.expert_parameters
        attention = c.n_blocks * (c.attention_parameters + 2 * c.d_model) + c.d_model  # with the norms
        dense, ends = (c.n_blocks - c.n_moe_blocks) * 3 * c.d_model * c.d_ff, 2 * c.vocab_size * c.d_model
        used = c.total_parameters - idle - attention - dense - ends
        parts = {"embedding, head": ends, "attention": attention, "dense SwiGLU": dense, "experts used": used}
        for colour, (part, count) in zip(SERIES, (parts | {"experts idle": idle}).items(), strict=True):
            share = 100 * count / c.total_parameters
            axes.barh(row, share, left=left, color=colour, label=part if row == 0 else None)
            if share > 5:
                axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", color="white")
            left += share
        millions = f"{c.total_parameters / 1e6:.1f} million,\n{c.active_parameters / 1e6:.1f} active"
        axes.text(101, row, millions, va="center")
    axes.set(yticks=range(len(PRESETS)), yticklabels=PRESETS, xlim=(0, 115), xlabel="percent of all parameters")
    axes.invert_yaxis()
    axes.legend(ncols=5, loc="lower left", bbox_to_anchor=(-0.1, 1), handlelength=1)
    return figure


def residual() -> Figure:
    """Over the blocks: size of the stream, size of what is added, and what could be said already."""
    facts = measured("residual")
    figure, (stream, added, said) = panels(1, 3, 2.8, facts)
    stops = range(len(facts["stream_rms"]))
    low, middle, high = ([each[name] for each in facts["stream_rms"]] for name in ("low", "median", "high"))
    stream.fill_between(stops, low, high, alpha=0.25, label="nine in ten tokens")
    stream.plot(stops, middle, "o-", ms=3, label="median")
    label(stream, "The stream", "after block (0: embedding)", "root mean square", ylim=0)
    for name, part, mark in (("attention", "attention_rms", "o-"), ("SwiGLU", "ffn_rms", "s--")):
        added.plot(stops[1:], [each["median"] for each in facts[part]], mark, ms=3, label=name)
    experts = ", ".join(str(at) for at, kind in enumerate(facts["blocks"], start=1) if kind == "experts")
    label(added, "What a block adds to it", f"block (experts in {experts})", "root mean square, median", ylim=0)
    said.plot(stops, facts["bits_per_byte"], "o-", ms=3, color=PURPLE)
    label(said, "If it spoke there", "after block (0: embedding)", "bits per byte")
    for axes in (stream, added):
        axes.legend()
    return figure


# --- docs/concepts/attention.md ---


def trade() -> Figure:
    """What a small cache costs in bits per byte, and how fast it is."""
    figure, (quality, speed) = panels(1, 2, 3.2)
    with (RESULTS / "ablations.csv").open(encoding="utf-8", newline="") as file:
        runs = [run for run in csv.DictReader(file) if run["tokens"] == "131072"]
    # numbers that nano-5m keeps per token in its 8 blocks
    for row, name, kept in (("muon", "MLA", 8 * 96), ("gqa", "GQA", 8 * 232), ("mha", "MHA", 8 * 352)):
        bits = [float(run["bits_per_byte"]) for run in runs if run["row"] == row]
        (dots,) = quality.plot([kept] * len(bits), bits, "o", ms=4)
        quality.plot(kept, fmean(bits), "_", ms=18, color=dots.get_color())
        quality.text(kept, max(bits) + 0.005, name, ha="center", weight="bold")
    title = "Equal parameters, equal text\nnano-5m, three seeds and their mean"
    label(quality, title, "numbers kept per token", "bits per byte", xlim=(0, 3200), ylim=(2.62, 2.76))
    record = json.loads((RESULTS / "2026-11-23_2-cores_inference.json").read_text(encoding="utf-8"))
    situations = {"1": "one reply", "8": "8 rows after 512 tokens", "64": "64 rows after 512 tokens"}
    engines = ("transformers", "transformers, expanded", "nanollm")
    names = ("latents, expanded anew (transformers)", "keys and values kept (transformers)", "latents, absorbed (ours)")
    for series, (engine, name) in enumerate(zip(engines, names, strict=True)):
        spreads = [record[each]["tokens_per_s"].get(engine) for each in situations.values()]
        places = [place + 0.16 * (series - 1) for place, each in enumerate(spreads) if each]
        medians = [each["median"] for each in spreads if each]
        ends = [[abs(each[end] - each["median"]) for each in spreads if each] for end in ("least", "greatest")]
        speed.errorbar(places, medians, ends, fmt="os^"[series], ms=4, capsize=3, label=name)
        for place, median in zip(places, medians, strict=True):
            speed.text(place + 0.07, median, f"{median:.0f}", va="center")
    label(
        speed, "Decoding", "replies at once", "tokens/s of all replies", yscale="log", ylim=(5, 1500), xlim=(-0.4, 2.5)
    )
    speed.set_xticks(range(3), list(situations))
    speed.legend(loc="upper left")
    return figure


def heads() -> Figure:
    """How much of its attention each head gives to four places."""
    facts = measured("attention")
    figure, all_axes = panels(1, 4, 3.0, facts, sharey=True)
    for axes, (habit, name) in zip(all_axes, HABITS.items(), strict=True):
        shares = facts["heads"][habit]
        heat_map(axes, shares, 21)
        for block, row in enumerate(shares):
            for head, share in enumerate(row):
                axes.text(head + 0.5, block + 0.5, f"{100 * share:.0f}", ha="center", va="center", size=7)
        axes.set(title=name, xlabel="head; percent of its attention")
        axes.set_xticks([head + 0.5 for head in range(len(shares[0]))], range(1, len(shares[0]) + 1))
        axes.set_yticks([block + 0.5 for block in range(len(shares))], range(1, len(shares) + 1))
    all_axes[0].set_ylabel("block")
    return figure


def patterns() -> Figure:
    """What four heads look at in a sentence; a row is a token, its cells the tokens that it looks at."""
    facts = measured("attention")
    figure, all_axes = panels(2, 2, 7.6, facts)
    tokens = [text.strip() or text for text in facts["sentence"]["tokens"]]
    places = [at + 0.5 for at in range(len(tokens))]
    for axes, (habit, name) in zip(all_axes.flat, HABITS.items(), strict=True):
        shown = facts["sentence"]["shown"][habit]
        heat_map(axes, [[percent / 100 for percent in row] for row in shown["percent"]], 10)
        title = f"Block {shown['block']}, head {shown['head']}: {name}\n{100 * shown['share']:.0f} % in documents"
        axes.set(title=title, aspect="equal")
        axes.set_xticks(places, tokens, rotation=90)
        axes.set_yticks(places, tokens)
    return figure


# --- docs/concepts/experts.md ---


def expert_load() -> Figure:
    """Share of the tokens that each expert got, and the bias of its router, over the steps of a run."""
    facts = measured("training")
    figure, all_axes = panels(2, 2, 4.6, facts, sharex=True, sharey="row")
    bias_steps = [0, *map(int, facts["bias"])]
    for column, (block, (load, bias)) in enumerate(zip(facts["blocks"], all_axes.T, strict=True)):
        for expert, style in enumerate(("-", "--")):
            loads = [row[column][expert] for row in facts["load"]]
            load.plot(facts["steps"], loads, color=SERIES[expert], lw=0.5, alpha=0.5)
            load.plot(facts["steps"], smoothed(loads, 9), style, color=SERIES[expert], label=f"expert {expert + 1}")
            biases = [0.0, *(each[column][expert] for each in facts["bias"].values())]
            bias.plot(bias_steps, biases, style, marker="o", ms=2, color=SERIES[expert])
        load.axhline(0.5, color=GREY, lw=0.8)
        label(load, f"Block {block}: load", "", "share of the step's tokens", ylim=(0, 1))
        label(bias, f"Block {block}: bias of the choice", "step", f"moved by {facts['balance_rate']:g} a step")
    all_axes[0, 0].legend(ncols=2)
    return figure


# --- docs/concepts/grpo.md ---


def pulls(ratios: Sequence[float], advantage: float, c: ObjectiveConfig) -> list[float]:
    """Minus the gradient of the loss by the token's log-probability, at each ratio."""
    logprobs = torch.tensor(ratios).log().requires_grad_()
    old, advantages = torch.zeros(len(ratios)), torch.full((len(ratios),), advantage)
    terms, _ = surrogate(logprobs, old, advantages, torch.arange(len(ratios)), c)
    (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
    return (-gradient).tolist()


def grpo_clip() -> Figure:
    """How much a token pulls at the weights when its probability has changed since it was drawn, by the code itself."""
    figure, all_axes = panels(1, 2, 2.8)
    c, ratios = ObjectiveConfig(), [0.01, 0.799, 0.801, 1.279, 1.281, 4.99, 5.01, 6.0]  # straight between these
    names = {"clip": f"clip to {1 - c.clip_low:g} … {1 + c.clip_high:g} (PPO)"}
    names["cispo"] = f"CISPO, weight at most {c.cispo_max:g}"
    for axes, advantage, title in zip(all_axes, (1.0, -1.0), ("A better reply: A = 1", "A worse: A = −1"), strict=True):
        for kind, style in zip(names, ("-", "--"), strict=True):
            axes.plot(ratios, pulls(ratios, advantage, ObjectiveConfig(surrogate=kind)), style, label=names[kind])
        label(axes, title, "new probability / old probability", "factor of ∇ log p")
    all_axes[0].legend()
    return figure


def grpo_steps() -> Figure:
    """Five panels over the steps of a run, and one of the models before and after it."""
    facts = measured("grpo")
    figure, ((reward, solved, compared), (dropped, entropy, length)) = panels(2, 3, 4.8, facts)
    zero_variance = [100 * a / b for a, b in zip(facts["groups_dropped"], facts["groups"], strict=True)]
    for axes, title, unit, values in (
        (reward, "Reward", "mean of a step's replies", facts["reward"]),
        (dropped, "Groups that teach nothing", "percent of the step's groups", zero_variance),
        (entropy, "Entropy", "nats per token", facts["entropy"]),
        (length, "Length of the replies", "tokens, mean", facts["reply_tokens"]),
    ):
        steps, known = zip(*((s, v) for s, v in zip(facts["steps"], values, strict=True) if v is not None), strict=True)
        axes.plot(steps, known, lw=0.5, alpha=0.6, color=BLUE)
        axes.plot(steps, smoothed(known, max(1, len(known) // 12)), color=BLUE)
        label(axes, title, "step; thick: moving mean", unit, ylim=0)
    checks = [[each[f"val_accuracy{end}"] for each in facts["checks"]] for end in ("", "_low", "_high")]
    intervals(solved, [each["step"] for each in facts["checks"]], *checks, fmt="o-", color=GREEN)
    label(solved, "Solved on the way", "step", f"percent of {facts['validation_problems']} others", ylim=(0, 100))
    for name, beside, mark, colour in (("before", -0.1, "s", GREY), ("after", 0.1, "o", GREEN)):
        scores = [[each[name][key] for each in facts["evaluations"]] for key in ("value", "low", "high")]
        places = [at + beside for at in range(len(scores[0]))]
        intervals(compared, places, *scores, fmt=mark, color=colour, label=name)
        for place, share in zip(places, scores[0], strict=True):
            side = "right" if beside < 0 else "left"
            compared.text(place + beside / 2, 100 * share, f"{100 * share:.1f}", va="center", ha=side)
    label(compared, "Before and after", "split of the problems", "percent, 95 % intervals", ylim=(0, 100))
    compared.set_xlim(-0.7, len(facts["evaluations"]) - 0.3)
    compared.set_xticks(range(len(facts["evaluations"])), [each["split"] for each in facts["evaluations"]])
    compared.legend()
    return figure


def intervals(axes: Axes, xs: Sequence[float], *found: Sequence[float], **how: Any) -> None:
    """Shares with the low and high ends of their intervals, in percent."""
    value, low, high = (100 * np.array(each) for each in found)
    axes.errorbar(xs, value, [value - low, high - value], ms=3, capsize=2, **how)


CHARTS: dict[str, Callable[[], Figure]] = {
    "parameters": parameters,
    "residual": residual,
    "trade": trade,
    "heads": heads,
    "patterns": patterns,
    "expert-load": expert_load,
    "grpo-clip": grpo_clip,
    "grpo-steps": grpo_steps,
}


def tenths(attribute: re.Match[str]) -> str:
    """The places in an attribute to a tenth of a point; words between tags stay as they are."""
    return re.sub(r"\d+\.\d\d+", lambda number: f"{float(number[0]):.1f}", attribute[0])


def svg(name: str) -> str:
    """The chart as SVG that follows the reader's light or dark scheme."""
    text = StringIO()
    CHARTS[name]().savefig(text, format="svg", metadata={"Date": None, "Title": name})
    drawn = re.sub(r" +$", "", re.sub(r" *\n(?=[LCQz])", " ", text.getvalue()), flags=re.MULTILINE)
    drawn = re.sub(r'"[^"]*"', tenths, drawn)
    for number, colour in enumerate(DARK):
        drawn = drawn.replace(colour, f"var(--c{number})")
    light, dark = (
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours))
        for colours in (DARK.keys(), DARK.values())
    )
    style = f"<style>:root {{{light}}} @media (prefers-color-scheme: dark) {{:root {{{dark}}}}}</style>"
    drawn = drawn.replace("<defs>", f"{style}\n <defs>", 1)
    return "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())


def main(words: Sequence[str]) -> int:
    """Exit status: 0 all charts are as they should be, 1 some are not."""
    drawn = {HERE / f"{name}.svg": svg(name) for name in CHARTS}
    stale = [file for file, text in drawn.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if "--check" in words:
        print(*(f"{file.name}: run python docs/figures/draw.py" for file in stale), sep="\n")
        return 1 if stale else 0
    for file in stale:
        file.write_text(drawn[file], encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
