"""Calls a foreign function in a process of its own, with a time limit.

It runs in a process of its own, which is ended when it takes too long and replaced (pebble does both).
Nothing here imports torch: the other process starts in a fraction of a second.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import cache
from multiprocessing import get_context
from typing import Self

from pebble import ProcessExpired, ProcessPool

from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import import_object

Verdict = float | str
"""The number, or what went wrong instead."""

OPTION = "reward.weights"
MAX_TIMEOUTS = 5
"""Timeouts in one call after which the remaining replies are not judged: a function that blocks always must not hold
a run for hours."""
START_S = 60.0  # for the process to start and to import the function; that is not the function's time


class Judge:
    """A function of the user, by import path, asked for one reply after the other."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        function = import_object(path, OPTION)  # a wrong path is found here, before anything is sampled
        if not callable(function):
            raise ValueError(
                f"{path} is {type(function).__name__}, expected a function of a problem and a reply's text"
            )
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, judged: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """A number for each problem and reply, or what went wrong, in their order. Raises nothing."""
        verdicts: list[Verdict] = []
        timeouts = 0
        for problem, text in judged:
            if timeouts == MAX_TIMEOUTS:
                verdicts.append("was not asked after too many timeouts")
                continue
            try:
                if self._pool is None:
                    self._start()
                assert self._pool is not None
                verdicts.append(self._pool.schedule(_call, [self.path, problem, text], timeout=self.timeout_s).result())
            except TimeoutError:
                timeouts += 1
                verdicts.append(f"took longer than {self.timeout_s} s")
                self._stop()
            except Exception as error:  # it ended its process, or that process was killed while it waited
                ended = isinstance(error, ProcessExpired | BrokenProcessPool)
                timeouts += not ended
                verdicts.append("ended its process" if ended else f"could not be asked: {_told(error)}")
                self._stop()
        return verdicts

    def _start(self) -> None:
        """Have a process that is ready for a reply."""
        self._pool = ProcessPool(max_workers=1, context=get_context("spawn"))
        try:
            self._pool.schedule(_load, args=[self.path], timeout=START_S).result()
        except TimeoutError:
            raise ValueError(f"importing {self.path} took longer than {START_S:.0f} s; {OPTION} needs it") from None

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


@cache
def _function(path: str) -> Callable[[Problem, str], object]:
    function: Callable[[Problem, str], object] = import_object(path, OPTION)
    return function


def _load(path: str) -> None:
    with redirect_stdout(sys.stderr):
        _function(path)


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    except Exception:  # its __str__ raises as well
        return type(error).__name__


def _call(path: str, problem: Problem, text: str) -> Verdict:
    """In the other process: everything that the function can do wrong but never end."""
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            value = _function(path)(problem, text)
            if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
                return f"returned {value!r}"[:200]
            number = float(value)
    except BaseException as error:  # whatever a stranger's function raises, SystemExit too
        return f"raised {_told(error)}"[:200]
    return number if math.isfinite(number) else f"returned {number}"
