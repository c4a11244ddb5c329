"""Rewards: what a reply is worth.

Rewards are composed by name, each with a weight. Our own are pure and quick; yours come by import path and run in a
process of their own, so that one that raises, returns nonsense or never returns costs its reply the part and nothing
else.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from nanollm.config import check_at_least
from nanollm.rl.sandbox import Judge
from nanollm.sources.environments import Verdict
from nanollm.sources.gsm8k import ANSWER_MARK, Problem, extract_answer, number_of, true_share
from nanollm.sources.tasks import Task

OWN = ("correct", "calculations", "format", "length")
LONGEST_S = 86_400  # for one reply


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a reply is rewarded for."""

    weights: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    """Name and weight of each part: correct (0 or 1, the task's own judgement), calculations (0 to 1: the share of
    the steps whose notes <<48/2=24>> are true), format (0 or 1: one answer after #### in the last line), length (0 to
    -1: too long, see soft_tokens), or package.module:function of your own, called with the problem and the reply's text
    and returning a number, or in TRL's form (docs/post-training.md)."""
    soft_tokens: int = 32
    """For length: number of tokens before rollout.max_tokens over which the penalty grows from 0 to -1; a reply that is
    cut off has -1 (soft overlong punishment, DAPO, arXiv:2503.14476, equation 13)."""
    timeout_s: float = 1.0
    """Time limit of your own functions per reply, in seconds."""

    def __post_init__(self) -> None:
        if not self.weights or not any(self.weights.values()):
            raise ValueError(f"reward.weights must name at least one part with a weight, got {self.weights}")
        for name, weight in self.weights.items():
            if name not in OWN and ":" not in name:
                raise ValueError(
                    f"reward.weights knows {', '.join(OWN)} and import paths package.module:function, got {name!r}"
                )
            if not math.isfinite(weight):
                raise ValueError(f"reward.weights: the weight of {name} must be a number, got {weight}")
        check_at_least(1, self, "soft_tokens", prefix="reward.")
        if not 0 < self.timeout_s <= LONGEST_S:
            raise ValueError(f"reward.timeout_s must be above 0 and at most {LONGEST_S:,}, got {self.timeout_s}")


@dataclass(frozen=True)
class RewardInput:
    """A reply as rewards see it."""

    text: str
    tokens: int  # with the end mark
    ended: bool
    outcome: Verdict | None = None  # of a conversation: its environment's verdict, in place of the task's grade
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Reward:
    """What a reply earned: the weighted sum, and each part before its weight."""

    total: float
    parts: dict[str, float]


Judged = tuple[Problem, RewardInput]


class Rewards:
    """Turns replies into rewards; a context, because functions of your own live in another process."""

    def __init__(self, c: RewardConfig, task: Task, max_tokens: int) -> None:
        self.weights = c.weights
        self.faults: Counter[str] = Counter()
        """What went wrong with parts since this was last emptied, and how often."""
        own: dict[str, Callable[[Problem, RewardInput], Verdict]] = {
            "correct": lambda problem, reply: (
                float(task.grade(problem, reply.text)) if reply.outcome is None else reply.outcome
            ),
            "calculations": lambda problem, reply: true_share(reply.text),
            "format": lambda problem, reply: well_formed(reply),
            "length": lambda problem, reply: overlong(reply, max_tokens, c.soft_tokens),
        }
        self._ours = {name: own[name] for name in c.weights if name in OWN}
        self._judges = {name: Judge(name, c.timeout_s) for name in c.weights if name not in OWN}
        self._processes = ExitStack()

    def __enter__(self) -> Self:
        with self._processes:  # closes what has started if another does not
            for judge in self._judges.values():
                self._processes.enter_context(judge)
            self._processes = self._processes.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.close()

    def __call__(self, judged: Sequence[Judged]) -> list[Reward]:
        """The reward of each reply. A part that fails is counted in `faults` and is worth no more than any other."""
        parts = {name: self._filled(name, self._verdicts(name, judged)) for name in self.weights}
        rewards = []
        for number in range(len(judged)):
            values = {name: column[number] for name, column in parts.items()}
            rewards.append(Reward(sum(self.weights[name] * value for name, value in values.items()), values))
        return rewards

    def _verdicts(self, name: str, judged: Sequence[Judged]) -> list[Verdict]:
        if name in self._judges:
            return self._judges[name]([(problem, (reply.text, reply.ids, reply.ended)) for problem, reply in judged])
        return [_ask(self._ours[name], problem, reply) for problem, reply in judged]

    def _filled(self, name: str, verdicts: Sequence[Verdict]) -> list[float]:
        """Where a part failed, the worst that it gave to any reply, and no better than 0: failing must not pay."""
        worst = min if self.weights[name] >= 0 else max
        instead = worst([0.0, *(verdict for verdict in verdicts if isinstance(verdict, float))])
        self.faults.update(f"{name} {verdict}" for verdict in verdicts if isinstance(verdict, str))
        return [instead if isinstance(verdict, str) else verdict for verdict in verdicts]


def _ask(part: Callable[[Problem, RewardInput], Verdict], problem: Problem, reply: RewardInput) -> Verdict:
    try:
        return part(problem, reply)
    except Exception as error:  # a task of your own may raise anything: the step goes on, and says so
        return f"raised {type(error).__name__}: {error}"


def well_formed(reply: RewardInput) -> float:
    """1 for a reply that ended and whose last line, and no other, is "#### number"."""
    *before, last = reply.text.rstrip("\n").split("\n")
    answer = extract_answer(last) if last.startswith(ANSWER_MARK) else None
    is_alone = all(ANSWER_MARK not in line for line in before) and last.count(ANSWER_MARK) == 1
    return float(reply.ended and is_alone and answer is not None and number_of(answer) is not None)


def overlong(reply: RewardInput, max_tokens: int, soft_tokens: int) -> float:
    """0 up to max_tokens - soft_tokens tokens, then linear down to -1; -1 for a reply that was cut off."""
    if not reply.ended:
        return -1.0
    return -max(0.0, min(1.0, (reply.tokens - (max_tokens - soft_tokens)) / soft_tokens))
