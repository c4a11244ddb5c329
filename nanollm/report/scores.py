"""What do the evaluations beside a run say, as rows with n and interval?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from nanollm.report.charts import interval_bar
from nanollm.report.folder import Evaluation, Run


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of one model."""

    model: str
    what: str
    value: float | None
    """None: it was no number."""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = "%"
    """%: the value is a share from 0 to 1."""

    @property
    def shown(self) -> str:
        """Value and interval as people read them."""
        if self.value is None:
            return "–"
        if self.unit == "%":
            form, scale = "{:.1f}", 100.0
        else:
            form, scale = "{:.4f}", 1.0
        value = f"{form.format(scale * self.value)} {self.unit}".strip()
        if self.low is None or self.high is None:
            return value
        return f"{value} ({form.format(scale * self.low)} to {form.format(scale * self.high)})"


def scores_of(run: Run) -> Iterator[Score]:
    """All figures of all evaluations in the run's folder, those of the models it was compared with too."""
    for evaluation in run.evaluations:
        for side, name in (("bundle", run.name), ("against", "against")):
            if side in evaluation.figures:
                measured = evaluation.figures[side]
                model = name if side == "bundle" else measured["path"]
                yield from _of_model(model, evaluation, measured)


def _of_model(model: str, evaluation: Evaluation, measured: Mapping[str, Any]) -> Iterator[Score]:
    task = _task(evaluation)
    for grader, score in measured.get("greedy", {}).get("scores", {}).items():
        yield _score(model, f"{task}, {grader}, greedy", score)
    for grader, scores in measured.get("samples", {}).get("scores", {}).items():
        for tries, score in scores.items():
            yield _score(model, f"{task}, {grader}, {tries}", score)
    for text in [*measured.get("text", []), *measured.get("data", [])]:
        yield _score(
            model, f"{text['path']}, {text['bytes']:,} bytes", text | {"value": text["bits_per_byte"]}, "bits per byte"
        )
    for name, of_task in measured.get("harness", {}).get("tasks", {}).items():
        for metric, score in of_task["metrics"].items():
            what = f"{name}, {metric}, {of_task['shots']} shots, as lm_eval tells it"
            yield _score(model, what, {"n": of_task["n"]} | score, "")
    for name, suite in measured.get("harness", {}).get("suites", {}).items():
        yield _score(model, f"{name}, mean above chance (1: all right)", suite, "")


def _score(model: str, what: str, figures: Mapping[str, Any], unit: str = "%") -> Score:
    value, low, high = (
        number if number is not None and math.isfinite(number) else None
        for number in (figures.get(name) for name in ("value", "low", "high"))
    )
    return Score(model=model, what=what, value=value, low=low, high=high, n=figures.get("n"), unit=unit)


def with_bars(scores: Sequence[Score]) -> list[tuple[Score, Markup]]:
    """Each score with its interval as a picture; all shares on one scale, from 0 to the highest end."""
    most = max([score.high for score in scores if score.unit == "%" and score.high is not None], default=1.0)

    def bar(score: Score) -> Markup:
        if score.unit != "%" or score.value is None or score.low is None or score.high is None:
            return Markup("")
        return Markup(interval_bar(score.value, score.low, score.high, 0, most))

    return [(score, bar(score)) for score in scores]


def differences_of(run: Run) -> Iterator[tuple[str, str, float | None]]:
    """Of each comparison on the same problems or texts: what, the difference with its interval, and p if known."""
    for evaluation in run.evaluations:
        found = evaluation.figures
        versus = f"{run.name} minus {found['against']['path']}" if "against" in found else run.name
        for grader, pair in found.get("difference", {}).items():
            yield f"{versus}: {_task(evaluation)}, {grader}", _apart(pair, 100, "{:+.1f}", "points"), pair["p"]
        for text in found.get("bits_difference", []):
            yield f"{versus}: {text['path']}", _apart(text, 1, "{:+.4f}", "bits per byte"), None
        for task, metrics in found.get("harness_difference", {}).items():
            for metric, pair in metrics.items():
                yield f"{versus}: {task}, {metric}", _apart(pair, 1, "{:+.4f}", ""), pair["p"]
        for suite, each in found.get("suite_difference", {}).items():
            yield f"{versus}: {suite}, mean above chance", _apart(each, 1, "{:+.4f}", ""), None


def _apart(pair: Mapping[str, Any], scale: float, form: str, unit: str) -> str:
    told = f"{form.format(scale * pair['difference'])} {unit}".strip()
    if pair["low"] is None or pair["high"] is None:
        return told
    return f"{told} ({form.format(scale * pair['low'])} to {form.format(scale * pair['high'])})"


def notes_of(run: Run) -> Iterator[str]:
    """What was found of the questions in the training text."""
    for evaluation in run.evaluations:
        if found := evaluation.figures.get("contamination"):
            share = f"{len(found['overlaps']):,} of {found['questions']:,} questions"
            yield f"{_task(evaluation)}: {share} share {found['n']} words in a row with the training text"


def _task(evaluation: Evaluation) -> str:
    task = evaluation.figures["settings"]["task"]
    return f"{task['name']} {task['split']}" if task["name"] != "none" else evaluation.name
