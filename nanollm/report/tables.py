"""Tables of the page: facts of runs, settings in which they differ, scores of evaluations with n and interval."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanollm.progress import duration
from nanollm.report.folder import RunFolder
from nanollm.train.run import flat

Figures = Mapping[str, Any]

STAGES = {
    "pretrain": "Pretraining",
    "sft": "Instruction tuning",
    "grpo": "GRPO",
    "prefer": "Learning from preferences",
    "distill": "Distillation",
}
TASKS = {"words": "word problems", "gsm8k": "GSM8K"}

# --- facts ---


def headline(run: RunFolder) -> str:
    """What a run did and what came of it: "GRPO on word problems: 94.5 % to 97.1 % of 200 test problems"."""
    task = run.settings.get("task", {}).get("name")
    what = STAGES[run.stage] + (f" on {TASKS.get(task, task)}" if task else "")
    for title, unit, moments in outcomes(run):
        change = " to ".join(dict.fromkeys(unit.write({"value": moment["value"]}) for moment in moments))
        of = f" of {moments[-1]['n'] or 'the'} test problems"
        return f"{what}: {change}{of}" if unit is PERCENT else f"{what}: {title} {change}"
    return what


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
    for title, unit, moments in outcomes(run):
        yield title, " → ".join(map(unit.write, moments))
    if run.seconds:
        yield "time", f"{duration(run.seconds)}, until the last line, evaluations included"
    if rates := run.numbers.get("tokens_per_s"):
        yield "speed", f"{median(rate for _, rate in rates):,.0f} tokens/s (median)"
    if peaks := run.numbers.get("peak_memory_gb"):
        yield "peak memory", f"{max(peak for _, peak in peaks):.2f} GB"
    if run.skipped:
        yield "skipped updates", f"{len(run.skipped):,}, the last in step {run.skipped[-1]:,}"
    yield from origin(run)


def outcomes(run: RunFolder) -> Iterator[tuple[str, "Unit", list[Figures]]]:
    """What was measured along the way, its unit, and its figures before and after."""
    for name, title, unit in (
        ("val_bpb", "bits per byte", PLAIN),
        ("val_loss", "validation loss", PLAIN),
        ("val_accuracy", "problems solved", PERCENT),
        ("reward", "reward", PLAIN),
    ):
        if name in run.numbers and not (name == "val_loss" and "val_bpb" in run.numbers):
            more = {key: dict(run.numbers.get(f"{name}_{key}", [])) for key in ("low", "high", "n")}
            ends = (run.numbers[name][0], run.numbers[name][-1])
            yield title, unit, [{key: of.get(step) for key, of in more.items()} | {"value": y} for step, y in ends]


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


# --- scores: what an eval.json says ---


@dataclass(frozen=True)
class Unit:
    """How a figure is written: scaled by a factor, in a format, with a name behind it."""

    name: str
    scale: float
    form: str

    def write(self, figures: Figures, name: str = "value", sign: str = "") -> str:
        """The figure of that name and its interval, where there is one; a dash for what is no number."""
        value, low, high = (figures.get(each) for each in (name, "low", "high"))
        if value is None or not math.isfinite(value):
            return "–"

        def text(number: float) -> str:
            return f"{self.scale * number:{sign}{self.form}}"

        interval = "" if low is None or high is None else f" ({text(low)} to {text(high)})"
        return f"{text(value)} {self.name}".strip() + interval


PERCENT, BITS, PLAIN = Unit("%", 100, ".1f"), Unit("bits per byte", 1, ".4f"), Unit("", 1, ".4f")
POINTS = Unit("points", 100, ".1f")


def scores_of(evaluation: Figures, name: str = "") -> Iterator[tuple[str, str, str, int | None]]:
    """All figures of a bundle, and of the one it was compared with: model, what was measured, the figure, and n.

    name: what the bundle is called; its path, where there is none.
    """
    for side in ("bundle", "against"):
        if measured := evaluation.get(side):
            model = name if name and side == "bundle" else measured["path"]
            for what, figures, unit in figures_of(evaluation, measured):
                yield model, what, unit.write(figures), figures.get("n")
    for part in ("clean", "copied"):
        for grader, score in evaluation.get("contamination", {}).get(f"{part}_scores", {}).items():
            what = f"{task_of(evaluation)}, {grader}, greedy, {part} questions"
            yield name or evaluation["bundle"]["path"], what, PERCENT.write(score), score["n"]


def figures_of(evaluation: Figures, measured: Figures) -> Iterator[tuple[str, Figures, Unit]]:
    """What was measured of one model, the figures of it, and their unit."""
    task = task_of(evaluation)
    for grader, score in measured.get("greedy", {}).get("scores", {}).items():
        yield f"{task}, {grader}, greedy", score, PERCENT
    for grader, scores in measured.get("samples", {}).get("scores", {}).items():
        for tries, score in scores.items():
            yield f"{task}, {grader}, {tries}, temperature {evaluation['settings']['temperature']:g}", score, PERCENT
    for text in [*measured.get("text", []), *measured.get("data", [])]:
        yield f"{text['path']}, {text['bytes']:,} bytes", {**text, "value": text["bits_per_byte"]}, BITS
    harness = measured.get("harness", {"tasks": {}, "suites": {}})
    for name, of_task in harness["tasks"].items():
        chance = f", chance {of_task['chance']:.4g}" if of_task["chance"] else ""
        for metric, score in of_task["metrics"].items():
            yield f"{name}, {metric}, {of_task['shots']} shots{chance}", {"n": of_task["n"], **score}, PLAIN
    for name, suite in harness["suites"].items():
        asked, missing = len(suite["tasks"]), suite["missing"]  # a suite without some of its tasks is called a part
        part = f" ({asked} of its {asked + len(missing)} tasks, without {' and '.join(missing)})" if missing else ""
        yield f"{name}{part}, mean above chance (1: all right)", suite, PLAIN


def differences_of(evaluation: Figures, name: str = "") -> Iterator[tuple[str, str, float | None]]:
    """Of each comparison on the same problems or texts: what, the difference with its interval, and p if known."""
    task, copies = task_of(evaluation), evaluation.get("contamination", {})
    pairs = [(f"{task}, {grader}", each, POINTS) for grader, each in evaluation.get("difference", {}).items()]
    pairs += [(each["path"], each, BITS) for each in evaluation.get("bits_difference", [])]
    for of_task, metrics in evaluation.get("harness_difference", {}).items():
        pairs += [(f"{of_task}, {metric}", each, PLAIN) for metric, each in metrics.items()]
    for suite, each in evaluation.get("suite_difference", {}).items():
        pairs.append((f"{suite}, mean above chance", each, PLAIN))
    for what, pair, unit in pairs:
        versus = f"{name or evaluation['bundle']['path']} minus {evaluation['against']['path']}"
        yield f"{versus}: {what}", unit.write(pair, "difference", "+"), pair.get("p")
    for grader, pair in copies.get("copied_minus_clean", {}).items():
        yield f"{task}, {grader}: copied minus clean questions", POINTS.write(pair, "difference", "+"), None


def notes_of(evaluation: Figures) -> Iterator[str]:
    """Questions that stand in the training text."""
    if found := evaluation.get("contamination"):
        share = f"{len(found['overlaps']):,} of {found['questions']:,} questions"
        note = f"{task_of(evaluation)}: {share} share {found['n']} words in a row with the training text"
        yield note + (f"; {found['unsearched']:,} were too short to look for" if found.get("unsearched") else "")


def task_of(evaluation: Figures) -> str:
    task = evaluation["settings"]["task"]
    return f"{task['name']} {task['split']}"
