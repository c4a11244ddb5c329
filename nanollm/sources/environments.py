"""Environments: partners in a conversation, which answer each message of a model and in the end say what it earned.

A task whose problems are such conversations has `environment` in place of `grade`. One is here: guess the number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nanollm.sources.gsm8k import Problem

Verdict = float | str
"""What a reply or a conversation is worth, or what went wrong instead."""


class Environment(Protocol):
    """The other side of one conversation. One of your own needs no base class, only this method; docs/howto/own-task.md
    shows one.

    A task has `environment(problem)`, which makes a new one for each conversation, in place of `grade`; the question
    opens the conversation.
    """

    def step(self, reply: str, /) -> str | float:
        """Told the model's next message: the user's answer to it, or the reward, with which the conversation ends. A
        reward of 1 or more means solved."""


MakeEnvironment = Callable[[Problem], Environment]


@dataclass(frozen=True)
class GuessTheNumber:
    """Find a number from 1 to `largest` in as many guesses as halving needs in the worst case; each number in turn.

    The reward is 1 for a guess that is right, and 0 when the guesses are used up or a reply is no number.
    """

    largest: int = 9

    def __post_init__(self) -> None:
        if not 2 <= self.largest <= 10**6:
            raise ValueError(f"largest must be from 2 to 1,000,000 for guess, got {self.largest:,}")

    def problems(self, split: str) -> list[Problem]:
        """One for each number. All splits ask the same: what is unknown is the number."""
        if split not in ("train", "test"):
            raise ValueError(f"guess has no split {split!r}; it has train, test")
        question = f"Guess my number from 1 to {self.largest}."
        return [Problem(question, str(number)) for number in range(1, self.largest + 1)]

    def environment(self, problem: Problem) -> "Hints":
        return Hints(int(problem.answer), guesses=self.largest.bit_length())


@dataclass
class Hints:
    """Says "higher" or "lower" as long as there are guesses left."""

    number: int
    guesses: int

    def step(self, reply: str, /) -> str | float:
        self.guesses -= 1
        if not re.fullmatch(r"\s*\d{1,9}\s*", reply, re.ASCII):
            return 0.0
        guess = int(reply)
        if guess == self.number:
            return 1.0
        return ("higher" if guess < self.number else "lower") if self.guesses else 0.0
