"""How is what lm-evaluation-harness found out written down: as figures with intervals, as a difference, as samples?

Its metrics keep their names: `metric,filter`, here without the filter `none`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from nanollm.evals.figures import Figures
from nanollm.evals.intervals import Z, mean_interval, paired, ratio
from nanollm.evals.suite import Suite

OF_DOCUMENT = ("doc_id", "doc", "target", "arguments", "filter")  # of a sample: the same for every model
OF_MODEL = ("resps", "filtered_resps")


@dataclass(frozen=True)
class Answers:
    """What one model answered."""

    found: Mapping[str, Any]
    """What lm_eval.simple_evaluate returns."""
    samples: Mapping[str, list[dict[str, Any]]]
    """By task, its record of each document and filter, as JSON has it."""
    suites: Sequence[Suite] = ()

    @cached_property
    def figures(self) -> Figures:
        """By task or group: n documents, shots, version, chance, and per metric its value, stderr and 95 % interval."""
        return {
            task: {"n": sums["sample_len"], "shots": self.found["n-shot"].get(task)}
            | {"version": self.found["versions"].get(task), "chance": self.chance(task)}
            | {"metrics": dict(self._metrics(task, sums))}
            for task, sums in self.found["results"].items()
            if "sample_len" in sums  # a group may add nothing up
        }

    def _metrics(self, task: str, sums: Mapping[str, Any]) -> Iterator[tuple[str, Figures]]:
        for key, value in sums.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            metric = name if kind == "none" else key
            stderr = sums.get(f"{name}_stderr,{kind}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            low, high = interval(float(value), stderr, self.values(task, metric))
            yield metric, {"value": float(value), "stderr": stderr, "low": low, "high": high}

    @cached_property
    def suite_figures(self) -> Figures:
        """By suite: the mean of its centred tasks."""
        return {suite.name: suite.score(self.figures) for suite in self.suites}

    def chance(self, task: str) -> float | None:
        """What a choice by chance scores: one over the number of choices, on average; None where nothing is chosen."""
        if self.found["configs"].get(task, {}).get("output_type") != "multiple_choice":
            return None
        return fmean(1 / choices_of(sample["arguments"]) for sample in self.samples[task])

    def values(self, task: str, metric: str) -> list[Any]:
        """What each document gave, in their order; none for a group."""
        name, _, kind = metric.partition(",")
        samples = [sample for sample in self.samples.get(task, []) if sample["filter"] == (kind or "none")]
        return [sample[name] for sample in samples if name in sample]

    def minus(self, other: "Answers") -> Figures:
        """By task and metric the difference on the same documents, where it is a mean over them."""
        found: Figures = {}
        for task, figures in self.figures.items():
            for metric, figure in figures["metrics"].items():
                mine, theirs = self.values(task, metric), other.values(task, metric)
                if mine and are_numbers((*mine, *theirs)) and math.isclose(fmean(mine), figure["value"]):
                    found.setdefault(task, {})[metric] = difference(mine, theirs)
        return found

    def suites_minus(self, differences: Figures) -> Figures:
        """By suite the same, from the differences of its tasks."""
        return {suite.name: suite.difference(self.figures, differences) for suite in self.suites}


def choices_of(arguments: Sequence[Sequence[str]]) -> int:
    """How many texts are compared: several continuations of one context, or several contexts of one continuation."""
    return max(len({pair[place] for pair in arguments}) for place in (0, 1))


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Figures:
    """Of the means over the same documents; with McNemar's p where each of them is right or wrong."""
    if all(value in (0, 1) for value in (*mine, *theirs)):
        pair = paired([bool(value) for value in mine], [bool(value) for value in theirs])
        return {"difference": pair.difference} | asdict(pair)
    mean = ratio([ours - other for ours, other in zip(mine, theirs, strict=True)], [1.0] * len(mine))
    return {"difference": mean.value, "n": len(mine), "low": mean.low, "high": mean.high}


def are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(each, int | float) for each in values)


def interval(value: float, stderr: float | None, values: Sequence[Any]) -> tuple[float | None, float | None]:
    """Of a mean of numbers from 0 to 1 that of evals/intervals.py, else the normal one; None where nothing is known."""
    is_share = values and are_numbers(values) and all(0 <= each <= 1 for each in values)
    if is_share and math.isclose(fmean(values), value):
        mean = mean_interval(values)
        return mean.low, mean.high
    return (None, None) if stderr is None else (value - Z * stderr, value + Z * stderr)


def records(models: Mapping[str, Answers], task: str) -> Iterator[Figures]:
    """One per document and filter of a task, with what each model, by its name, made of it."""
    for samples in zip(*(answers.samples[task] for answers in models.values()), strict=True):
        record: Figures = {key: samples[0][key] for key in OF_DOCUMENT}
        for name, sample in zip(models, samples, strict=True):
            record[name] = {key: sample[key] for key in (*OF_MODEL, *sample["metrics"])}
        yield record
