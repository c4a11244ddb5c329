"""Tables of the page: facts of runs, settings in which they differ, scores of evaluations with n and interval."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanollm.progress import duration
from nanollm.report.folder import Evaluation, RunFolder
from nanollm.train.run import flat

Figures = Mapping[str, Any]

# --- facts ---


def facts(runs: Sequence[RunFolder]) -> Iterator[tuple[str, list[str]]]:
    """A row for each fact: its name, and its text for each run."""
    rows: list[dict[str, str]] = [dict(facts_of(run)) for run in runs]
    for name in dict.fromkeys(name for row in rows for name in row):
        yield name, [row.get(name, "") for row in rows]


def facts_of(run: RunFolder) -> Iterator[tuple[str, str]]:
    """The facts of one run, as far as it has come."""
    yield "stage", run.stage
    state = "done" if run.is_done else f"{run.step / run.steps:.0%}"
    yield "steps", f"{run.step:,} of {run.steps:,} ({state})"
    if run.model:
        total, active = run.model.total_parameters, run.model.active_parameters
        yield "parameters", f"{total:,}, {active:,} active per token"
    if run.tokens_per_step:
        yield "tokens", f"{run.step * run.tokens_per_step:,} ({run.tokens_per_step:,} per step)"
    yield from outcomes(run)
    if run.seconds:
        yield "time", f"{duration(run.seconds)}, until the last line, evaluations included"
    if rates := run.numbers.get("tokens_per_s"):
        yield "speed", f"{median(rate for _, rate in rates):,.0f} tokens/s (median)"
    if peaks := run.numbers.get("peak_memory_gb"):
        yield "peak memory", f"{max(peak for _, peak in peaks):.2f} GB"
    if run.skipped:
        yield "skipped updates", f"{len(run.skipped):,}, the last in step {run.skipped[-1]:,}"
    yield from origin(run)


def outcomes(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Before and after."""
    for name, title, form in (
        ("val_bpb", "bits per byte", ".4f"),
        ("val_loss", "validation loss", ".4f"),
        ("val_accuracy", "problems solved", ".1%"),
        ("reward", "reward", ".3f"),
    ):
        if name in run.numbers and not (name == "val_loss" and "val_bpb" in run.numbers):
            (_, before), (_, after) = run.numbers[name][0], run.numbers[name][-1]
            yield title, f"{before:{form}} → {after:{form}}"


def origin(run: RunFolder) -> Iterator[tuple[str, str]]:
    """Code, machine and data."""
    if run.starts:
        last = run.starts[-1]
        device = last["gpu"] if run.settings.get("device") == "cuda" else last["processor"]
        yield "machine", f"{device}, {last['cores']} cores, {last['threads']} threads, {last['processes']} process(es)"
        yield "computed in", str(run.settings.get("dtype", ""))
        commit = last["commit"] or "unknown"
        yield "code", f"nanollm {last['nanollm']}, commit {commit}, torch {last['torch']}, Python {last['python']}"
    for folder, manifest in run.data.items():
        train = manifest["splits"]["train"]
        yield f"data in {folder}", f"{train['tokens']:,} tokens of {manifest['source'].get('dataset', 'files')}"
    for name, digest in sorted(run.inputs.items()):
        yield f"sha256 of {name}", str(digest)[:16]


def differing_settings(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Dotted names of the settings in which runs differ, and the value of each run."""
    settings = [flat(run.settings) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    cells = {name: [each.get(name, "(not there)") for each in settings] for name in names}
    return [(name, of_runs) for name, of_runs in cells.items() if len(set(of_runs)) > 1 and name != "out"]


# --- scores ---


@dataclass(frozen=True)
class Unit:
    """How a figure is written: scaled by a factor, in a format, with a name behind it."""

    name: str
    scale: float
    form: str

    def write(self, value: float, low: float | None, high: float | None) -> str:
        """A value and its interval, where there is one."""
        text = f"{self.scale * value:{self.form}} {self.name}".strip()
        if low is None or high is None:
            return text
        return f"{text} ({self.scale * low:{self.form}} to {self.scale * high:{self.form}})"


PERCENT = Unit("%", 100, ".1f")
BITS = Unit("bits per byte", 1, ".4f")
AS_IT_IS = Unit("", 1, ".4f")
DIFFERENCES = {
    PERCENT: Unit("points", 100, "+.1f"),
    BITS: Unit("bits per byte", 1, "+.4f"),
    AS_IT_IS: Unit("", 1, "+.4f"),
}


@dataclass(frozen=True)
class Score:
    """One figure of one model; None for what is no number."""

    model: str
    what: str
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    n: int | None

    @classmethod
    def of(cls, model: str, what: str, figures: Figures, unit: Unit) -> "Score":
        value, low, high = (
            number if number is not None and math.isfinite(number) else None
            for number in (figures.get(name) for name in ("value", "low", "high"))
        )
        return cls(model, what, unit, value, low, high, figures.get("n"))

    @property
    def shown(self) -> str:
        return "–" if self.value is None else self.unit.write(self.value, self.low, self.high)


def scores_of(run: RunFolder) -> Iterator[Score]:
    """All figures of all evaluations in the run's folder, those of the models it was compared with too."""
    for evaluation in run.evaluations:
        for side in ("bundle", "against"):
            if measured := evaluation.figures.get(side):
                model = run.name if side == "bundle" else measured["path"]
                for what, figures, unit in figures_of(evaluation, measured):
                    yield Score.of(model, what, figures, unit)


def figures_of(evaluation: Evaluation, measured: Figures) -> Iterator[tuple[str, Figures, Unit]]:
    """What was measured of one model, the figures of it, and their unit."""
    task = task_of(evaluation)
    for grader, score in measured.get("greedy", {}).get("scores", {}).items():
        yield f"{task}, {grader}, greedy", score, PERCENT
    for grader, scores in measured.get("samples", {}).get("scores", {}).items():
        for tries, score in scores.items():
            yield f"{task}, {grader}, {tries}", score, PERCENT
    for text in [*measured.get("text", []), *measured.get("data", [])]:
        yield f"{text['path']}, {text['bytes']:,} bytes", {**text, "value": text["bits_per_byte"]}, BITS
    harness = measured.get("harness", {"tasks": {}, "suites": {}})
    for name, of_task in harness["tasks"].items():
        for metric, score in of_task["metrics"].items():
            what = f"{name}, {metric}, {of_task['shots']} shots, as lm_eval tells it"
            yield what, {"n": of_task["n"], **score}, AS_IT_IS
    for name, suite in harness["suites"].items():
        yield f"{name}, mean above chance (1: all right)", suite, AS_IT_IS


def differences_of(run: RunFolder) -> Iterator[tuple[str, str, float | None]]:
    """Of each comparison on the same problems or texts: what, the difference with its interval, and p if known."""
    for evaluation in run.evaluations:
        found = evaluation.figures
        pairs: list[tuple[str, Figures, Unit]] = []
        pairs += [
            (f"{task_of(evaluation)}, {name}", each, PERCENT) for name, each in found.get("difference", {}).items()
        ]
        pairs += [(each["path"], each, BITS) for each in found.get("bits_difference", [])]
        for task, metrics in found.get("harness_difference", {}).items():
            pairs += [(f"{task}, {metric}", each, AS_IT_IS) for metric, each in metrics.items()]
        for suite, each in found.get("suite_difference", {}).items():
            pairs.append((f"{suite}, mean above chance", each, AS_IT_IS))
        for what, pair, unit in pairs:
            difference = DIFFERENCES[unit].write(pair["difference"], pair["low"], pair["high"])
            yield f"{run.name} minus {found['against']['path']}: {what}", difference, pair.get("p")


def notes_of(run: RunFolder) -> Iterator[str]:
    """Questions that stand in the training text."""
    for evaluation in run.evaluations:
        if found := evaluation.figures.get("contamination"):
            share = f"{len(found['overlaps']):,} of {found['questions']:,} questions"
            yield f"{task_of(evaluation)}: {share} share {found['n']} words in a row with the training text"


def task_of(evaluation: Evaluation) -> str:
    task = evaluation.figures["settings"]["task"]
    return f"{task['name']} {task['split']}" if task["name"] != "none" else evaluation.name
