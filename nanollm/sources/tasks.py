"""Tasks: what a model is asked, and how its replies are graded.

A task has problems, by split, and grades replies: evaluation and reinforcement learning see nothing else of it. In
place of a grade it may have an environment, which answers replies (sources/environments.py). Three are here: GSM8K, the
generated word problems, and guessing a number; any other is a class of your own (see Task).
"""

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast

from nanollm.config import check_seed
from nanollm.progress import say
from nanollm.sources import gsm8k
from nanollm.sources.environments import GuessTheNumber, MakeEnvironment
from nanollm.sources.files import BadRecord
from nanollm.sources.gsm8k import Problem
from nanollm.sources.word_problems import WordProblems

OURS = ("words", "gsm8k", "guess")
OWNERS = {"input": ("gsm8k",), "largest": ("words", "guess")}  # of an option; of the others: words
OWN = re.compile(r"\w+(\.\w+)*:\w+")  # package.module:Name


class Task(Protocol):
    """Problems and their grader. One of your own needs no base class, only these two methods.

    In a file mine.py in the current folder, for --task.name mine:Doubles

        from nanollm.sources.gsm8k import Problem


        class Doubles:
            def problems(self, split):
                numbers = {"train": range(80), "test": range(80, 100)}[split]
                return [Problem(f"What is {n} plus {n}?", str(n + n)) for n in numbers]

            def grade(self, problem, reply):
                return reply.strip() == problem.answer

    Training imitates `answer`, so it should look like a perfect reply. `grade` sees any text a model can write: it
    must be quick and must not raise. gsm8k.extract_answer and gsm8k.number_of are there for numbers.
    """

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of a split, the same at each call. ValueError or KeyError: there is no such split."""

    def grade(self, problem: Problem, reply: str) -> bool:
        """Whether the reply is right."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which task, and the settings of ours."""

    name: str = "words"
    """words: generated math word problems; gsm8k: GSM8K; guess: find a number in several turns; or module:Name, a class
    of your own in an importable module or in a file of the current folder (mine:Doubles is the class Doubles of
    mine.py)."""
    input: list[Path] = field(default_factory=list)
    """For gsm8k: files or folders with train and test in their names; none: the dataset from the hub."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """For words: numbers of steps to a solution, from 1 to 4; each comes equally often."""
    largest: int = 20
    """For words: the largest number stated in a problem. Totals may be larger; no number of a problem exceeds 5 times
    this. For guess: the largest number to find."""
    seed: int = 0
    """For words: another seed gives other problems."""

    def __post_init__(self) -> None:
        if self.name not in OURS and not OWN.fullmatch(self.name):
            raise ValueError(
                f"task.name must be {', '.join(OURS)} or module:Name, got {self.name!r}; mine:Doubles is the class "
                f"Doubles in mine.py"
            )
        for option in fields(TaskConfig)[1:]:  # one of another task would be without effect
            owners, default = OWNERS.get(option.name, ("words",)), default_of(option)
            if self.name not in owners and getattr(self, option.name) != default:
                why = f"is for {' and '.join(owners)}, not for {self.name}"
                raise ValueError(f"task.{option.name} {why}; leave it at {default}")
        try:
            _ = GuessTheNumber(self.largest) if self.name == "guess" else self.word_problems()
        except ValueError as error:
            raise ValueError(f"task.{error}") from None
        check_seed(self.seed, "task.seed")

    def word_problems(self) -> WordProblems:
        return WordProblems(levels=tuple(self.levels), largest=self.largest, seed=self.seed)


def default_of(option: Field[Any]) -> object:
    """What an option of a dataclass is when nobody gives it."""
    return option.default_factory() if callable(option.default_factory) else option.default


def open_task(c: TaskConfig) -> Task:
    """The task that is asked for. Each of its splits has a problem, or asking for it is a ValueError."""
    if c.name == "words":
        return c.word_problems()
    if c.name == "gsm8k":
        return Gsm8k(tuple(c.input))
    if c.name == "guess":
        return cast(Task, GuessTheNumber(c.largest))
    return _Checked(c.name, _open_own(c.name))


def environments_of(task: Task) -> MakeEnvironment | None:
    """What makes the partner of each conversation of a task; None for one that grades replies."""
    return getattr(task, "environment", None)


@dataclass(frozen=True)
class Gsm8k:
    """GSM8K from files, or from the hub where there are none."""

    inputs: tuple[Path, ...] = ()

    def problems(self, split: str) -> list[Problem]:
        """All problems of "train" or "test". Bad records are left out, and said."""
        if split not in ("train", "test"):
            raise ValueError(f"gsm8k has no split {split!r}; it has train, test")
        bad: list[BadRecord] = []
        found = list(gsm8k.problems(self.inputs or None, split, bad.append))
        if bad:
            say(f"gsm8k, {split}: {len(bad):,} bad records were left out, the first: {bad[0]}")
        if not found:
            raise ValueError(f"gsm8k has no problem for {split}; look at --task.input")
        return found

    def grade(self, problem: Problem, reply: str) -> bool:
        """Whether the reply's number after "####" is the problem's."""
        return gsm8k.grade(reply, problem.answer)


@dataclass(frozen=True)
class _Checked:
    """A task of the user's own: its mistakes are told as mistakes of that task."""

    name: str
    task: Task

    @property
    def environment(self) -> MakeEnvironment | None:
        return environments_of(self.task)

    def problems(self, split: str) -> Sequence[Problem]:
        try:
            found = self.task.problems(split)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.name} has no split {split!r}: {type(error).__name__}: {error}") from error
        if not isinstance(found, Sequence) or not found or not isinstance(found[0], Problem):
            raise ValueError(f"{self.name}.problems({split!r}) must return a list of Problem, got {found!r:.60}")
        return found

    def grade(self, problem: Problem, reply: str) -> bool:
        is_right = self.task.grade(problem, reply)
        if not isinstance(is_right, bool):  # a forgotten return would count as wrong for ever
            raise ValueError(f"{self.name}.grade must return True or False, got {is_right!r:.60}")
        return is_right


def _open_own(name: str) -> Task:
    """The object that "module:Name" makes when it is called without arguments."""
    made_by = import_object(name, "task.name")
    try:
        task = made_by()
        _ = task.problems, environments_of(task) or task.grade
    except (TypeError, AttributeError) as error:
        raise ValueError(f"task.name is {name}, which makes no task: {error}; see sources.tasks.Task") from error
    return cast(Task, task)


def import_object(name: str, option: str) -> Any:
    """What "module:Name" stands for, or a ValueError that names the option it was given for."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that a folder `datasets` of the user hides no library
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{option} is {name} (module:Name), but {error}; a module is looked for where Python looks and in {here}"
        ) from error
