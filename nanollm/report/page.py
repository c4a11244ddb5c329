"""The page of a run, or of several side by side: one HTML file without scripts, fonts or pictures from elsewhere.

The content is chosen here, as plain values; `page.html` lays it out.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nanollm import __version__
from nanollm.config import to_yaml
from nanollm.durable import write_file
from nanollm.progress import duration, say
from nanollm.report.charts import Series, all_positive, heat_map, key, line_chart, short
from nanollm.report.folder import RunFolder, read_run
from nanollm.report.tables import differences_of, differing_settings, facts, headline, notes_of, scores_of
from nanollm.world import World

HERE = Path(__file__).parent
PAGE = "report.html"
MAX_COLUMNS = 80  # of a heat map
MAX_ROWS = 12  # rows of the table below a chart
DEAD = 0.01  # of its fair share of the tokens
REPLIES_SHOWN = 4
BPB = "Of text that is never trained on; comparable between tokenizers."
SOLVED = "With 95 % intervals; none of these problems is trained on."
SOLVED_INTERVAL = ("val_accuracy_low", "val_accuracy_high")
DROPPED = "All replies of such a group earned the same."
LOGPROBS = "mean difference of log-probabilities"


@dataclass(frozen=True)
class Quantity:
    """A number of metrics.jsonl and how it is drawn."""

    name: str
    title: str
    unit: str
    about: str = ""
    interval: tuple[str, str] = ("", "")
    """Names of its ends, if it has one."""
    log: bool = False
    smooth: bool = False
    from_zero: bool = False
    not_of: tuple[str, ...] = ()
    """Stages in which this number means something else."""


QUANTITIES = {
    "Learning": [
        Quantity("loss", "Training loss", "nats per trained token", log=True, smooth=True, not_of=("grpo", "prefer")),
        Quantity("val_bpb", "Validation", "bits per byte", about=BPB, log=True),
        Quantity("val_loss", "Validation loss", "nats per token", log=True),
        Quantity("val_accuracy", "Problems solved", "share of test problems, greedily", SOLVED, SOLVED_INTERVAL),
        Quantity("lr", "Learning rate", "step size"),
        Quantity("grad_norm", "Gradient norm", "L2 norm before clipping", log=True, smooth=True),
    ],
    "Learning from its own replies": [
        Quantity("reward", "Reward", "mean per reply", smooth=True),
        Quantity("completions/mean_length", "Length of replies", "tokens", smooth=True),
        Quantity("completions/clipped_ratio", "Replies cut at the limit", "share of all replies", smooth=True),
        Quantity("entropy", "Entropy", "nats per token", smooth=True),
        Quantity("kl", "Distance to the reference", "KL divergence, nats per token", smooth=True, not_of=("prefer",)),
        Quantity("frac_reward_zero_std", "Groups without a signal", "share of the groups", DROPPED, smooth=True),
        Quantity("clip_fraction", "Clipped", "share of tokens", smooth=True),
        Quantity("sampling/sampling_logp_difference/mean", "Engine against trainer", LOGPROBS, smooth=True),
    ],
    "Learning from preferences": [
        Quantity("loss", "Loss", "mean per example", smooth=True, not_of=("pretrain", "sft", "grpo", "distill")),
        Quantity("rewards/accuracies", "Chosen above rejected", "share of pairs", smooth=True),
        Quantity("val_rewards/accuracies", "Chosen above rejected, held out", "share of pairs"),
        Quantity("rewards/margins", "Margin", "reward of chosen minus rejected", smooth=True),
        Quantity("val_rewards/margins", "Margin, held out", "reward of chosen minus rejected"),
        Quantity("rewards/chosen", "Reward of chosen replies", "beta times log-ratio", smooth=True),
        Quantity("rewards/rejected", "Reward of rejected replies", "beta times log-ratio", smooth=True),
        Quantity("logps/chosen", "Log-probability of chosen replies", "nats per reply", smooth=True),
        Quantity("logps/rejected", "Log-probability of rejected replies", "nats per reply", smooth=True),
        Quantity("kl", "Reference point", "nats per reply", smooth=True, not_of=("grpo", "distill")),
    ],
    "Speed and memory": [
        Quantity("tokens_per_s", "Speed", "tokens/s", from_zero=True),
        Quantity("peak_memory_gb", "Peak memory", "GB", from_zero=True),
    ],
}
PART = re.compile("rewards/(.+)/mean")  # the parts of a reward


def write_report(out: Path, world: World) -> None:
    """report.html of a run that has just ended, by the main one of its processes."""
    if not world.is_main:
        return
    try:
        write_page(out / PAGE, [read_run(out)])
        say(f"what happened, as a page: {out / PAGE}")
    except Exception as error:  # a run that has saved all it made must not fail because of its page
        say(f"the page could not be written ({error!r}); mend that, and ask again: nanollm report {out}")


def write_page(
    page: Path, runs: Sequence[RunFolder], refresh_s: float | None = None, **more: "Sequence[Chart]"
) -> None:
    """See render."""
    write_file(page, render(runs, refresh_s, page.parent, **more).encode())


def render(
    runs: Sequence[RunFolder], refresh_s: float | None = None, folder: Path = Path(), **more: "Sequence[Chart]"
) -> str:
    """The page as HTML, to be written to `folder`: of one run, or of several with the first in front.

    With `refresh_s` the browser reads the page again after so many seconds; `more` are sections with other charts.
    """
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template("page.html").render(
        style=Markup((HERE / "style.css").read_text("utf-8")),
        title=" and ".join(run.name for run in runs) if runs[1:] else headline(runs[0]),
        earlier=[] if runs[1:] else [(run.name, link(run / PAGE, folder)) for run in runs[0].earlier],
        refresh_s=refresh_s,
        runs=runs,
        quiet=duration(runs[0].quiet_s),
        legend=keys([run.name for run in runs]),
        facts=list(facts(runs)),
        changed=differing_settings(runs) if runs[1:] else [],
        charts={**more, **{title: list(charts(runs, chosen)) for title, chosen in QUANTITIES.items()}},
        unmoved=[each.title for chosen in QUANTITIES.values() for each in chosen if is_unmoved(runs, each)],
        parts=list(reward_parts(runs)),
        experts=[(run, *experts(run)) for run in runs if run.loads],
        samples=[(run, written) for run in runs if (written := samples(run))],
        replies=[(run, replies(run)) for run in runs if run.rollouts],
        scores=[score for run in runs for each in run.evaluations for score in scores_of(each, run.name)],
        differences=[pair for run in runs for each in run.evaluations for pair in differences_of(each, run.name)],
        notes=[note for run in runs for each in run.evaluations for note in notes_of(each)],
        settings=[(run.name, to_yaml(run.settings)) for run in runs],
        made_by=f"nanollm {__version__}",
    )


def link(page: Path, folder: Path) -> str:
    """To a page, from one in `folder`."""
    return quote(Path(os.path.relpath(page, folder.resolve())).as_posix())


# --- curves ---


@dataclass(frozen=True)
class Chart:
    """A picture, its words, and its numbers as a table."""

    title: str
    unit: str
    about: str
    picture: Markup
    keys: Sequence[tuple[str, Markup]]
    """Lines by name, where the head of the page does not tell them apart."""
    columns: list[str]
    rows: list[list[str]]


def charts(runs: Sequence[RunFolder], quantities: Sequence[Quantity]) -> Iterator[Chart]:
    """One for each quantity that some run has, and that was not 0 throughout."""
    x_unit, stretch = x_axis(runs)
    for quantity in quantities:
        lines = [
            series_of(run, quantity, stretch[look], look)
            for look, run in enumerate(runs)
            if quantity.name in run.numbers and run.stage not in quantity.not_of
        ]
        if lines and not is_unmoved(runs, quantity):
            yield chart_of(quantity, lines, x_unit)


def is_unmoved(runs: Sequence[RunFolder], quantity: Quantity) -> bool:
    """Whether it was measured, and was 0 throughout."""
    seen = [run for run in runs if run.stage not in quantity.not_of]
    values = [y for run in seen for _, y in run.numbers.get(quantity.name, [])]
    return bool(values) and not any(values)


def reward_parts(runs: Sequence[RunFolder]) -> Iterator[Chart]:
    """What the rewards are made of, one chart for each run; none for a reward of one part."""
    for run in runs:
        parts = {name: part[1].replace("_", " ") for name in run.numbers if (part := PART.fullmatch(name))}
        lines = [
            series_of(run, Quantity(name, "", ""), 1.0, look, part) for look, (name, part) in enumerate(parts.items())
        ]
        if lines[1:]:
            title = "Parts of the reward" + (f", {run.name}" if runs[1:] else "")
            quantity = Quantity("rewards", title, "mean per reply", smooth=True)
            yield chart_of(quantity, lines, "steps", keys([line.name for line in lines]))


def series_of(run: RunFolder, quantity: Quantity, stretch: float, look: int, name: str = "") -> Series:
    """The points of a number, with its interval if it has one; `stretch` turns steps into the unit of the axis."""
    points = run.numbers[quantity.name]
    lows, highs = ([y for _, y in run.numbers.get(each, [])] for each in quantity.interval)
    has_interval = len(lows) == len(highs) == len(points)
    return Series(
        name=name or run.name,
        xs=[step * stretch for step, _ in points],
        ys=[y for _, y in points],
        look=look,
        lows=lows if has_interval else (),
        highs=highs if has_interval else (),
    )


def x_axis(runs: Sequence[RunFolder]) -> tuple[str, list[float]]:
    """Steps, but tokens where the steps of the runs are of different size; and what makes these of steps."""
    sizes = [run.tokens_per_step for run in runs]
    if len(set(sizes)) > 1 and None not in sizes:
        return "tokens", [float(size or 0) for size in sizes]
    return "steps", [1.0] * len(runs)


def keys(names: Sequence[str]) -> list[tuple[str, Markup]]:
    """Each name with a piece of its line."""
    return [(name, Markup(key(look))) for look, name in enumerate(names)]


def chart_of(
    quantity: Quantity, lines: Sequence[Series], x_unit: str, names: Sequence[tuple[str, Markup]] = ()
) -> Chart:
    """`names`: keys of the lines, where these are not the runs."""
    q, log = quantity, quantity.log and all_positive(lines)
    picture = line_chart(
        q.title, q.unit, lines, x_unit=x_unit, log=log, smooth=q.smooth, least=0.0 if q.from_zero else None
    )
    return Chart(
        title=q.title,
        unit=q.unit + (", logarithmic" if log else ""),
        about=q.about,
        picture=Markup(picture),
        keys=names,
        columns=[x_unit, *(line.name for line in lines)],
        rows=table_of(lines),
    )


def table_of(lines: Sequence[Series]) -> list[list[str]]:
    """Some of the points, evenly spread, the first and the last among them."""
    xs = sorted({x for line in lines for x in line.xs})
    chosen = sorted({xs[round(place * (len(xs) - 1) / (MAX_ROWS - 1))] for place in range(MAX_ROWS)})
    known = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    return [[f"{x:,.0f}", *(short(of[x]) if x in of else "" for of in known)] for x in chosen]


# --- experts, samples, replies ---


def experts(run: RunFolder) -> tuple[Markup, list[str]]:
    """The share of each expert over time, and the experts that get next to nothing at the end."""
    size = -(-len(run.loads) // MAX_COLUMNS)
    parts = [run.loads[max(0, end - size) : end] for end in range(len(run.loads), 0, -size)][::-1]
    shapes = [len(shares) for shares in run.loads[-1][1]]
    places = [(block, expert) for block, experts in enumerate(shapes) for expert in range(experts)]
    names = moe_blocks(run, len(shapes))
    rows = [f"{names[block]} · {expert + 1}" for block, expert in places]
    values = [[fmean(loads[block][expert] for _, loads in part) for part in parts] for block, expert in places]
    dead = [
        row for row, shares, (block, _) in zip(rows, values, places, strict=True) if shares[-1] * shapes[block] < DEAD
    ]
    steps = [part[-1][0] for part in parts]
    picture = heat_map("Share of the tokens", rows, steps, values, "steps", full=2 / max(shapes))
    return Markup(picture), dead


def moe_blocks(run: RunFolder, count: int) -> list[str]:
    """The blocks with a Mixture of Experts, numbered from 1; without a model only the mixtures can be numbered."""
    m = run.model
    if m is None:
        return [f"mixture {number}" for number in range(1, count + 1)]
    return [f"block {block + 1}" for block in range(m.n_blocks) if m.is_moe(block)]


def samples(run: RunFolder) -> list[tuple[str, list[tuple[int, str]]]]:
    """Each prompt with what the model wrote, step by step."""
    told = [(line["step"], line["samples"]) for line in run.lines if line.get("samples")]
    prompts = run.settings.get("sample_prompts") or []
    return [
        (prompt, [(step, texts[place]) for step, texts in told if place < len(texts)])
        for place, prompt in enumerate(prompts)
        if told
    ]


def replies(run: RunFolder) -> list[list[Mapping[str, Any]]]:
    """Of the newest kept step the first groups that taught something: the best and the worst reply of each."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in run.rollouts:
        groups.setdefault(record["question"], []).append(record)
    taught = [group for group in groups.values() if group[0]["trained"]]
    chosen = (taught or list(groups.values()))[:REPLIES_SHOWN]

    def worth(record: Mapping[str, Any]) -> float:
        return -math.inf if record["reward"] is None else float(record["reward"])  # null: it was not finite

    return [[max(group, key=worth), min(group, key=worth)] for group in chosen]
