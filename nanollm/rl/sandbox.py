"""Calls a foreign function in processes of its own, with a time limit.

A process that takes too long is killed and replaced (pebble does both). Nothing here imports torch: such a process
starts in a fraction of a second.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from contextlib import redirect_stdout
from functools import cache
from inspect import signature
from itertools import groupby
from multiprocessing import get_context
from typing import Any, Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from nanollm.sources.environments import Verdict
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import import_object

OPTION = "reward.weights"
MAX_TIMEOUTS = 5
"""Timeouts in one call after which the remaining replies are not judged: a function that blocks always must not hold
a run for hours."""
START_S = 60.0  # for a process to start and to import the function
WORKERS = 6
"""Processes: more than most machines have cores, because a function may well wait for something else."""

Reply = tuple[str, Sequence[int], bool]
"""Text, ids, and whether it ended."""


class Judge:
    """A function of the user, by import path, asked for many replies at once."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s  # for each reply
        function = import_object(path, OPTION)  # a wrong path is found here, before anything is sampled
        if not callable(function):
            raise ValueError(
                f"{path} is {type(function).__name__}, expected a function of a problem and a reply's text"
            )
        self.takes_groups = takes_groups(function)

    def __enter__(self) -> Self:
        # Each process imports the function before it is asked: that is not the function's time.
        self._pool = ProcessPool(WORKERS, context=get_context("spawn"), initializer=_load, initargs=[self.path])
        try:
            self._pool.schedule(_load, [self.path], timeout=START_S).result()
        except TimeoutError:
            self.__exit__()
            raise ValueError(f"importing {self.path} took longer than {START_S:.0f} s; {OPTION} needs it") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def __call__(self, judged: Sequence[tuple[Problem, Reply]]) -> list[Verdict]:
        """A number for each problem and reply, or what went wrong, in their order. Raises nothing."""
        units = [[each] for each in judged]
        if self.takes_groups:  # replies to the same problem stand beside each other
            units = [[*group] for _, group in groupby(judged, lambda each: id(each[0]))]
        asked = [(self._ask(unit[0][0], [reply for _, reply in unit]), len(unit)) for unit in units]
        verdicts: list[Verdict] = []
        timeouts = 0
        for future, size in asked:
            if timeouts == MAX_TIMEOUTS:
                future.cancel()
                verdicts += ["was not asked after too many timeouts"] * size
                continue
            try:
                verdicts += future.result()
            except TimeoutError:
                timeouts += 1
                verdicts += [f"took longer than {self.timeout_s * size} s"] * size
            except ProcessExpired:
                verdicts += ["ended its process"] * size
            except Exception as error:  # all processes are gone, or what it was given cannot be sent
                verdicts += [f"could not be asked: {_told(error)}"] * size
        return verdicts

    def _ask(self, problem: Problem, replies: Sequence[Reply]) -> ProcessFuture[list[Verdict]]:
        if not self._pool.active:  # a process was killed while it held the pipe that all share
            self.__exit__()
            self.__enter__()
        return self._pool.schedule(_call, [self.path, problem, replies], timeout=self.timeout_s * len(replies))


@cache
def _function(path: str) -> Callable[..., object]:
    function: Callable[..., object] = import_object(path, OPTION)
    return function


def _load(path: str) -> None:
    with redirect_stdout(sys.stderr):
        _function(path)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    except Exception:  # its __str__ raises as well
        return type(error).__name__


def _call(path: str, problem: Problem, replies: Sequence[Reply]) -> list[Verdict]:
    """In the other process: everything that the function can do wrong but never end."""
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            function = _function(path)
            if takes_groups(function):
                return [_verdict(value) for value in _rewards_of_group(function, problem, replies)]
            return [_verdict(function(problem, text)) for text, _, _ in replies]
    except BaseException as error:  # whatever a stranger's function raises, SystemExit too
        return [f"raised {_told(error)}"[:200]] * len(replies)


def _verdict(value: object) -> Verdict:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return f"returned {value!r}"[:200]
    number = float(value)
    return number if math.isfinite(number) else f"returned {number}"


def takes_groups(function: Callable[..., object]) -> bool:
    """Whether it has TRL's form: f(prompts, completions, completion_ids, **columns), a number or None for each."""
    try:
        return "completions" in signature(function).parameters
    except ValueError:  # of some builtins
        return False


def _rewards_of_group(function: Callable[..., Any], problem: Problem, replies: Sequence[Reply]) -> list[object]:
    """As TRL calls it, with the replies to one problem; None, "says nothing", adds nothing."""
    texts, ids, ended = map(list, zip(*replies, strict=True))
    columns = {"answer": problem.answer, **problem.columns, "prompts": problem.question}
    repeated = {name: [value] * len(replies) for name, value in columns.items()}
    values = [*function(**repeated | {"completions": texts, "completion_ids": ids, "ended": ended})]
    if len(values) != len(replies):
        raise ValueError(f"{len(values)} rewards for {len(replies)} completions")
    return [0.0 if value is None else value for value in values]
