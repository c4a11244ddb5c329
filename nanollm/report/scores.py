"""What do the evaluations beside a run say, as rows with n and interval?"""

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
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = "%"
    """%: the value is a share from 0 to 1."""

    @property
    def shown(self) -> str:
        """Value and interval as people read them."""
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
            what = f"{name}, {metric}, {of_task['shots']} shots"
            yield _score(model, what, {"n": of_task["n"]} | score, "")


def _score(model: str, what: str, figures: Mapping[str, Any], unit: str = "%") -> Score:
    low, high = figures.get("low"), figures.get("high")
    return Score(model=model, what=what, value=figures["value"], low=low, high=high, n=figures.get("n"), unit=unit)


def with_bars(scores: Sequence[Score]) -> list[tuple[Score, Markup]]:
    """Each score with its interval as a picture; all shares on one scale, from 0 to the highest end."""
    most = max([score.high for score in scores if score.unit == "%" and score.high is not None], default=1.0)
    return [
        (
            score,
            Markup(interval_bar(score.value, score.low, score.high, 0, most))
            if score.unit == "%" and score.low is not None and score.high is not None
            else Markup(""),
        )
        for score in scores
    ]


def differences_of(run: Run) -> Iterator[tuple[str, str, float]]:
    """Of each comparison on the same problems: what, the difference with its interval in points, and p."""
    for evaluation in run.evaluations:
        for grader, pair in evaluation.figures.get("difference", {}).items():
            low, high = 100 * pair["low"], 100 * pair["high"]
            other = evaluation.figures["against"]["path"]
            what = f"{run.name} minus {other}: {_task(evaluation)}, {grader}"
            yield what, f"{100 * pair['difference']:+.1f} points ({low:+.1f} to {high:+.1f})", pair["p"]


def notes_of(run: Run) -> Iterator[str]:
    """What was found of the questions in the training text."""
    for evaluation in run.evaluations:
        if found := evaluation.figures.get("contamination"):
            share = f"{len(found['overlaps']):,} of {found['questions']:,} questions"
            yield f"{_task(evaluation)}: {share} share {found['n']} words in a row with the training text"


def _task(evaluation: Evaluation) -> str:
    task = evaluation.figures["settings"]["task"]
    return f"{task['name']} {task['split']}" if task["name"] != "none" else evaluation.name
