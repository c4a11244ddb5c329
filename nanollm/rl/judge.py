"""How is a stranger's function asked without trusting it to answer?

It runs in a process of its own, which is ended when it takes too long and replaced (pebble does both).
Nothing here imports torch: the other process starts in a fraction of a second.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from functools import cache
from multiprocessing import get_context

from pebble import ProcessExpired, ProcessPool

from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import import_object

Verdict = float | str
"""The number, or what went wrong instead."""

OPTION = "reward.weights"
MAX_TIMEOUTS = 5
"""Timeouts in one call after which the remaining replies are not judged: a function that blocks always must not hold
a run for hours."""


class Judge:
    """A function of the user, by import path, asked for one reply after the other."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        function = import_object(path, OPTION)  # here too, so that a wrong path is found before anything is sampled
        if not callable(function):
            raise ValueError(
                f"{path} is {type(function).__name__}, expected a function of a problem and a reply's text"
            )
        self._pool = ProcessPool(max_workers=1, context=get_context("spawn"))
        # The first call waits for the process to start and to import the function; that is not the function's time.
        self._pool.schedule(_prepare, args=[path]).result()

    def __call__(self, judged: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """A number for each problem and reply, or what went wrong, in their order."""
        verdicts: list[Verdict] = []
        timeouts = 0
        for problem, text in judged:
            if timeouts == MAX_TIMEOUTS:
                verdicts.append("was not asked after too many timeouts")
                continue
            verdicts.append(self._ask(problem, text))
            timeouts += verdicts[-1] == self._too_slow
        return verdicts

    @property
    def _too_slow(self) -> str:
        return f"took longer than {self.timeout_s} s"

    def _ask(self, problem: Problem, text: str) -> Verdict:
        future = self._pool.schedule(_call, args=[self.path, problem, text], timeout=self.timeout_s)
        try:
            value = future.result()
        except TimeoutError:
            self._pool.schedule(_prepare, args=[self.path]).result()  # the new process, ready for the next reply
            return self._too_slow
        except ProcessExpired:
            return "ended its process"
        except Exception as error:  # whatever a stranger's function raises
            return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"returned {value!r}"[:200]
        return float(value)

    def close(self) -> None:
        """End the other process."""
        self._pool.stop()
        self._pool.join()


@cache
def _load(path: str) -> Callable[[Problem, str], object]:
    function: Callable[[Problem, str], object] = import_object(path, OPTION)
    return function


def _prepare(path: str) -> None:
    _load(path)


def _call(path: str, problem: Problem, text: str) -> object:
    return _load(path)(problem, text)
