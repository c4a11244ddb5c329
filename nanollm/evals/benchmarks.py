"""Asks tasks of lm-evaluation-harness, and suites of them, and gives figures with 95 % intervals.

lm_eval poses the questions, grades and aggregates; evals/lm_eval.py is the model that it sees. Its metrics keep their
names: `metric,filter`, here without the filter `none`.

A suite is a YAML file: tasks with their shots and metric. Each accuracy is centred, (accuracy - chance) / (1 - chance),
so that 0 is what guessing scores and 1 is everything right, and the figure is the mean over the tasks.
Source of suites: CORE of DCLM, arXiv:2406.11794, section 3.5.
"""

import contextlib
import json
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from nanollm.bundle import Bundle
from nanollm.config import did_you_mean, read_mapping
from nanollm.evals.lm_eval import NanoLM
from nanollm.evals.stats import Figures, Mean, Z, average, mean_interval, paired, ratio

SUITES = Path(__file__).parent / "suites"
EXAMPLE = "tasks: {mine: {task: hellaswag, metric: acc_norm, shots: 0}}"
RESAMPLES = 1000
"""Bootstrap samples behind lm_eval's standard error of what is no mean; its default of 100,000 takes minutes."""
OF_DOCUMENT = ("doc_id", "doc", "target", "arguments", "filter")  # fields of a sample that every model shares
OF_MODEL = ("resps", "filtered_resps")


# --- suites ---


@dataclass(frozen=True, kw_only=True)
class Member:
    """A task of a suite."""

    task: str
    """lm_eval's name of it."""
    metric: str
    shots: int = 0
    chance: float | None = None
    """What guessing scores; None: one over the number of choices, and 0 where nothing is chosen."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys that replace those of lm_eval's task."""


@dataclass(frozen=True)
class Suite:
    """Tasks by their names in it, and those that belong to it and cannot be asked, with the reason."""

    name: str
    members: Mapping[str, Member]
    missing: Mapping[str, str]

    def key(self, member: str) -> str:
        """The name of a task beside those of other suites."""
        return f"{self.name}:{member}"

    def score(self, tasks: Figures) -> Figures:
        """The figure of the suite from Answers.figures."""
        of_tasks: Figures = {}
        centred: dict[str, list[Mean]] = defaultdict(list)  # by lm_eval's task: the same documents
        for name, member in self.members.items():
            figures, chance = tasks[self.key(name)], self.chance(name, tasks)
            accuracy = figures["metrics"][member.metric]
            mean = Mean(accuracy["value"], accuracy["low"], accuracy["high"]).scaled(chance, 1)
            centred[member.task].append(mean)
            of_tasks[self.key(name)] = {"metric": member.metric, "chance": chance, "centred": mean.value}
        n = sum(tasks[key]["n"] for key in of_tasks)
        return asdict(average(list(centred.values()))) | {"n": n, "tasks": of_tasks, "missing": dict(self.missing)}

    def difference(self, tasks: Figures, differences: Figures) -> Figures:
        """The mean of what two models differ by on the same documents."""
        found: dict[str, list[Mean]] = defaultdict(list)
        for name, member in self.members.items():
            each = differences[self.key(name)][member.metric]
            span = 1 - self.chance(name, tasks)
            found[member.task].append(Mean(each["difference"], each["low"], each["high"]).scaled(0, span))
        mean = average(list(found.values()))
        return {"difference": mean.value, "low": mean.low, "high": mean.high}

    def chance(self, name: str, tasks: Figures) -> float:
        """What guessing scores in a task."""
        given, counted = self.members[name].chance, tasks[self.key(name)]["chance"]
        return float(given if given is not None else counted or 0.0)


def suite_names() -> list[str]:
    """The suites that come with NanoLLM."""
    return sorted(file.stem for file in SUITES.glob("*.yaml"))


def is_suite(name: str) -> bool:
    return name.endswith(".yaml") or name in suite_names()


def read_suite(name: str) -> Suite:
    """One of ours by its name, or a user's file."""
    file = Path(name) if name.endswith(".yaml") else SUITES / f"{name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"--harness {name} does not exist; it should be a suite, such as {EXAMPLE}")
    settings = read_mapping(file)
    try:
        members = {name: Member(**member) for name, member in settings["tasks"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a suite ({error}); expected tasks, such as {EXAMPLE}") from error
    return Suite(file.stem, members, settings.get("missing", {}))


# --- answers ---


@dataclass(frozen=True)
class Answers:
    """The answers of one model."""

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

    @property
    def suite_figures(self) -> Figures:
        """By suite: the mean of its centred tasks."""
        return {suite.name: suite.score(self.figures) for suite in self.suites}

    def chance(self, task: str) -> float | None:
        """What a random choice scores: one over the number of choices, on average; None where nothing is chosen."""
        if self.found["configs"].get(task, {}).get("output_type") != "multiple_choice":
            return None
        return fmean(1 / choices_of(sample["arguments"]) for sample in self.samples[task])

    def values(self, task: str, metric: str) -> list[Any]:
        """The value of each document, in their order; none for a group."""
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

    def records(self, task: str, names: Sequence[str], *others: "Answers") -> Iterator[Figures]:
        """One record per document and filter of a task, with the answers of this model and others by their names."""
        for samples in zip(*(answers.samples[task] for answers in (self, *others)), strict=True):
            record: Figures = {key: samples[0][key] for key in OF_DOCUMENT}
            for name, sample in zip(names, samples, strict=True):
                record[name] = {key: sample[key] for key in (*OF_MODEL, *sample["metrics"])}
            yield record


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
    """Of a mean of numbers from 0 to 1 that of evals/stats.py, else the normal one; None without a standard error."""
    is_share = values and are_numbers(values) and all(0 <= each <= 1 for each in values)
    if is_share and math.isclose(fmean(values), value):
        mean = mean_interval(values)
        return mean.low, mean.high
    return (None, None) if stderr is None else (value - Z * stderr, value + Z * stderr)


# --- tasks ---


Ask = Callable[[Bundle, int], Answers]
"""Lets a model answer all tasks, so many texts at once."""


def open_benchmarks(names: Sequence[str], folder: Path | None, limit: int | None, shots: int | None) -> Ask:
    """Find tasks and read their documents, from the hub where they lie there.

    folder: YAML files of the user's own tasks; limit: documents per task, the first ones (None: all); shots: examples
    before each question (None: as the task or the suite says). ValueError for a task that is unknown or unreadable, or
    has too few examples for its shots.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for those who write tasks
    if folder and not folder.is_dir():
        raise ValueError(f"--harness_tasks {folder} is not a folder; it should hold the YAML files of your tasks")
    suites = [read_suite(name) for name in names if is_suite(name)]
    single = dict.fromkeys(name for name in names if not is_suite(name))
    if suites and shots is not None:
        raise ValueError(f"--harness_shots does not go with {suites[0].name}: its tasks have shots of their own")
    manager = TaskManager(include_path=folder)
    for name in [*single, *(member.task for suite in suites for member in suite.members.values())]:
        if name not in manager.all_tasks:
            advice = "see `lm_eval ls tasks`; --harness_tasks adds your own"
            hint = did_you_mean(name, [*manager.all_tasks, *suite_names()], advice)
            raise ValueError(f"lm-evaluation-harness has no task {name!r}; {hint}")
    chosen = [item for name in single for item in load(name, manager)]
    chosen += [task for suite in suites for task in load_suite(suite, manager)]
    for task in (task for item in chosen for task in (item.get_all_tasks() if isinstance(item, Group) else [item])):
        wanted = task.config.num_fewshot if shots is None else shots
        if wanted and (found := len(task.fewshot_docs() or [])) < wanted:
            raise ValueError(f"the shots must be at most the {found:,} examples of {task.task_name}, got {wanted}")

    def ask(bundle: Bundle, rows: int) -> Answers:
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm_eval forks this process, threads and all
        with contextlib.redirect_stdout(sys.stderr):  # it prints; our stdout is for the figures
            found: Any = lm_eval.simple_evaluate(
                model=NanoLM(bundle, rows),
                tasks=list(chosen),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=RESAMPLES,
            )
        samples = json.loads(json.dumps(found["samples"], default=handle_non_serializable))
        return Answers(found, samples, suites)

    return ask


def load_suite(suite: Suite, manager: Any) -> list[Any]:
    """The tasks of a suite, under names of their own: one task can be in it twice, with other shots."""
    loaded = []
    for key, member in suite.members.items():
        if member.task not in manager.all_subtasks:
            raise ValueError(f"{member.task} of the suite {suite.name} is a group of tasks; name each of them")
        settings = {"task": member.task, "num_fewshot": member.shots, **member.settings}
        (group,) = load(member.task, manager, {"group": suite.key(key), "task": [settings]})
        (task,) = group.get_all_tasks()
        means = [metric for metric, how in task.aggregation().items() if how.__name__ == "mean"]
        if member.metric.partition(",")[0] not in means:
            raise ValueError(f"{suite.name} asks {member.task} for {member.metric}; its means are {', '.join(means)}")
        task.set_config("task", suite.key(key))
        loaded.append(task)
    return loaded


def load(name: str, manager: Any, spec: Any = None) -> list[Any]:
    """The task or the group of this name, or the tasks of this tag; `spec` is loaded instead, if given."""
    try:
        found = manager.load(spec or name)
    except Exception as error:  # no network, no such dataset, a package that this task needs, a broken YAML file, ...
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"the task {name} cannot be opened: {why}; check its YAML file and the network, or leave it out"
        ) from error
    groups, wanted = found.get("groups", {}), spec["group"] if spec else name
    return [groups[wanted]] if wanted in groups else list(found["tasks"].values())
