"""Which tasks of lm-evaluation-harness is a model asked, and what does it answer?

lm_eval writes the questions, judges and adds up; evals/harness.py is the model that it sees. Tasks are known by name;
one's own are YAML files in a folder.
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
    """Examples before each question; None: as the task says."""

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
        return Answers(found, json.loads(json.dumps(found["samples"], default=handle_non_serializable)))


def open_benchmarks(names: Sequence[str], folder: Path | None, limit: int | None, shots: int | None) -> Benchmarks:
    """Find tasks and read their documents, from the hub where they lie there.

    folder: YAML files of one's own tasks. ValueError for what is unknown, cannot be read or is not for a text model.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for those who write tasks
    if folder and not folder.is_dir():
        raise ValueError(f"--harness_tasks {folder} is not a folder; it should hold the YAML files of your tasks")
    manager = TaskManager(include_path=folder)
    for name in names:
        check_name(name, manager.all_tasks)
    benchmarks = Benchmarks(manager, [item for name in names for item in load(name, manager)], limit, shots)
    for task, times in Counter(task.task_name for task in benchmarks.tasks).items():
        if times > 1:
            raise ValueError(f"--harness names the task {task} {times} times, perhaps within a group; name it once")
    for task in benchmarks.tasks:
        check_task(task, shots)
    return benchmarks


def check_name(name: str, known: Sequence[str]) -> None:
    """Refuse a task that nobody knows."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them, --harness_tasks adds your own"
        raise ValueError(f"lm-evaluation-harness has no task {name!r}; {hint}")


def check_task(task: Any, shots: int | None) -> None:
    """Refuse a task that is not for us, or has too few examples."""
    for trait, why in REFUSED.items():
        if getattr(task, trait, False):
            raise ValueError(f"the task {task.task_name} {why}, which nanollm eval does not do; leave it out")
    if shots and (found := len(task.fewshot_docs() or [])) < shots:
        raise ValueError(f"--harness_shots must be at most the {found:,} examples of {task.task_name}, got {shots}")


def load(name: str, manager: Any) -> list[Any]:
    """The task or the group of this name, or the tasks of this tag."""
    try:
        found = manager.load(name)
    except Exception as error:  # no network, no such dataset, a package that this task needs, a broken YAML file, ...
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"the task {name} cannot be opened: {why}; check its YAML file and the network, or leave it out"
        ) from error
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())
