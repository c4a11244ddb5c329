"""Which tasks of lm-evaluation-harness is a model asked, and what does it answer?

lm_eval writes the questions, judges and adds up; evals/harness.py is the model that it sees. Tasks are known by name;
one's own are YAML files in a folder. A suite (evals/suite.py) asks several tasks, each with its own shots.
"""

import contextlib
import difflib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from nanollm.bundle import Bundle
from nanollm.evals.answers import Answers
from nanollm.evals.harness import NanoLM
from nanollm.evals.suite import Suite, is_suite, ours, read_suite

RESAMPLES = 1000
"""Behind lm_eval's standard error of what is no mean; its default of 100,000 takes minutes."""
REFUSED = {"UNSAFE_CODE": "runs what a model wrote", "MULTIMODAL": "shows more than text"}


@dataclass(frozen=True)
class Benchmarks:
    """Tasks that can be asked."""

    manager: Any
    chosen: list[Any]
    """lm_eval's tasks and groups of tasks."""
    limit: int | None
    """Documents per task, the first ones; None: all."""
    shots: int | None
    """Examples before each question; None: as the task or the suite says."""
    suites: list[Suite]

    @property
    def tasks(self) -> list[Any]:
        return [task for item in self.chosen for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]

    @property
    def documents(self) -> int:
        sizes = [len(task.eval_docs) for task in self.tasks]
        return sum(size if self.limit is None else min(size, self.limit) for size in sizes)

    def ask(self, bundle: Bundle, rows: int) -> Answers:
        """Let a model answer, `rows` texts at once."""
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm_eval forks this process, threads and all
        with contextlib.redirect_stdout(sys.stderr):  # it prints; our stdout is for the figures
            found: Any = lm_eval.simple_evaluate(
                model=NanoLM(bundle, batch_size=rows),
                tasks=list(self.chosen),
                task_manager=self.manager,
                num_fewshot=self.shots,
                limit=self.limit,
                bootstrap_iters=RESAMPLES,
            )
        samples = json.loads(json.dumps(found["samples"], default=handle_non_serializable))
        return Answers(found, samples, self.suites)


def open_benchmarks(names: Sequence[str], folder: Path | None, limit: int | None, shots: int | None) -> Benchmarks:
    """Find tasks and read their documents, from the hub where they lie there.

    folder: YAML files of one's own tasks. ValueError for what is unknown, cannot be read or is not for a text model.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for those who write tasks
    if folder and not folder.is_dir():
        raise ValueError(f"--harness_tasks {folder} is not a folder; it should hold the YAML files of your tasks")
    suites, single = [read_suite(name) for name in names if is_suite(name)], [n for n in names if not is_suite(n)]
    if suites and shots is not None:
        raise ValueError(
            f"--harness_shots is not for {suites[0].name}, whose tasks have shots of their own; leave it out"
        )
    manager = TaskManager(include_path=folder)
    for name in [*single, *(member.task for suite in suites for member in suite.members.values())]:
        check_name(name, manager.all_tasks)
    chosen = [item for name in single for item in load(name, manager)]
    chosen += [task for suite in suites for task in load_suite(suite, manager)]
    benchmarks = Benchmarks(manager, chosen, limit, shots, suites)
    for task, times in Counter(task.task_name for task in benchmarks.tasks).items():
        if times > 1:
            raise ValueError(f"--harness names the task {task} {times} times, perhaps within a group; name it once")
    for task in benchmarks.tasks:
        check_task(task, shots)
    return benchmarks


def check_name(name: str, known: Sequence[str]) -> None:
    """Refuse a task that nobody knows."""
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *ours()], n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them, --harness_tasks adds your own"
        raise ValueError(f"lm-evaluation-harness has no task {name!r}; {hint}")


def check_task(task: Any, shots: int | None) -> None:
    """Refuse a task that is not for us, or has too few examples for these shots, or else for its own."""
    for trait, why in REFUSED.items():
        if getattr(task, trait, False):
            raise ValueError(f"the task {task.task_name} {why}, which nanollm eval does not do; leave it out")
    wanted = task.config.num_fewshot if shots is None else shots
    if wanted and (found := len(task.fewshot_docs() or [])) < wanted:
        raise ValueError(f"the shots must be at most the {found:,} examples of {task.task_name}, got {wanted}")


def load_suite(suite: Suite, manager: Any) -> list[Any]:
    """Its tasks, under names of their own: one task can be in it twice, with other shots."""
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
    """The task or the group of this name, or the tasks of this tag; what is loaded is `spec`, if given."""
    try:
        found = manager.load(spec or name)
    except Exception as error:  # no network, no such dataset, a package that this task needs, a broken YAML file, ...
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"the task {name} cannot be opened: {why}; check its YAML file and the network, or leave it out"
        ) from error
    groups, wanted = found.get("groups", {}), spec["group"] if spec else name
    return [groups[wanted]] if wanted in groups else list(found["tasks"].values())
