"""Lets a model reply to the problems of a task, and asks graders for their verdicts.

The model gets each question as a user's message and replies, greedily or several times by chance; the task's grade,
the same function that gives rewards, says which replies are right. Where answers are written as GSM8K writes them,
three graders judge at once, because the way of reading an answer decides a score as much as the model does: strict (the
number behind "####"), flexible (the last number), checked (strict, and every calculator note in the reply is true).
There the answers of several replies can also vote (maj@k, arXiv:2203.11171).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

from nanollm.data.order import epoch_seed
from nanollm.evals.stats import wilson
from nanollm.generate.engine import Engine
from nanollm.generate.request import Completion, MakeTool, Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.turns import Turns, outcome_of, said
from nanollm.model.transformer import Transformer
from nanollm.progress import Progress, say
from nanollm.sources import gsm8k
from nanollm.sources.environments import MakeEnvironment, Verdict
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import Gsm8k, Task, environments_of
from nanollm.sources.word_problems import WordProblems
from nanollm.text.chat import Conversation, encode_prompt, reply_ends
from nanollm.text.tokenizer import Tokenizer
from nanollm.world import World

GREEDY = SamplingConfig(temperature=0)
ROWS = 256

Finish = Literal["end", "length", "no room"]
Grader = Callable[[Problem, str], bool]
HOW: Mapping[str, gsm8k.How] = {"strict": "strict", "flexible": "flexible"}
"""Graders that take a number out of a reply, and how."""


@dataclass(frozen=True)
class Attempt:
    """The replies of a model to one problem: one entry per sample."""

    problem: Problem
    replies: list[str]
    finish: list[Finish]
    """end: the model ended its reply; length: it was cut; no room: the question fills the model's whole context, so it
    was not read and its reply is empty."""
    tokens: list[int]
    """Of each reply, without the end token."""
    outcomes: Sequence[Verdict | None] = ()
    """Of each reply: what the environment of a conversation said. None was asked where there was no room."""


@dataclass(frozen=True)
class Accuracy:
    """How many of n problems were solved, and the 95 % interval of that share."""

    n: int
    correct: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.correct / self.n

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> "Accuracy":
        """Raises ValueError for no verdicts at all."""
        return cls(len(verdicts), sum(verdicts), *wilson(sum(verdicts), len(verdicts)))


@dataclass(frozen=True)
class Judged:
    """Attempts and the verdicts on them."""

    attempts: list[Attempt]
    verdicts: dict[str, list[list[bool]]]
    """By the grader's name: for each problem, one per sample."""
    faults: int
    """Replies for which a grader raised an error; they count as wrong."""

    def first(self, grader: str) -> list[bool]:
        """For each problem, whether its first reply is right."""
        return [of_problem[0] for of_problem in self.verdicts[grader]]


def accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    *,
    max_tokens: int,
    tool: MakeTool | None = None,
    rows: int = ROWS,
    world: World | None = None,
) -> Accuracy:
    """The share of these problems that a model solves greedily, by the task's own grade.

    The ranks of a world share the problems, and all get the same answer.
    """
    world = world or World()
    ask = partial(solve, model, tokenizer, list(world.shard(problems)), environment=environments_of(task))
    verdicts = judge(ask(max_tokens=max_tokens, tool=tool, rows=rows), {"correct": grade_of(task)}).first("correct")
    return Accuracy.of([verdict for of_rank in world.all_gather(verdicts) for verdict in of_rank])


def solve(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    sampling: SamplingConfig = GREEDY,
    *,
    max_tokens: int,
    tool: MakeTool | None = None,
    environment: MakeEnvironment | None = None,
    samples: int = 1,
    seed: int = 0,
    rows: int = ROWS,
    called: str = "solving",
) -> list[Attempt]:
    """Let a model reply to each problem `samples` times, `rows` replies at once; attempts in the problems' order.

    What is drawn for a problem depends on the seed and its place among those that are read, not on `rows`.
    """
    limit, ends = model.config.context_length, reply_ends(tokenizer)
    prompts = [encode_prompt(Conversation.of(problem.question), tokenizer) for problem in problems]
    read = [place for place, prompt in enumerate(prompts) if len(prompt) < limit]
    longest = max((len(prompts[place]) for place in read), default=1)
    engine = Engine(model, rows=max(1, min(rows, len(read) * samples)), length=min(longest + max_tokens, limit))
    first_seed = epoch_seed(seed, 0) >> 2  # far from those of the next seed
    completions: dict[int, list[Completion]] = {place: [] for place in read}
    for number, place in enumerate(place for place in read for _ in range(samples)):
        request = Request(
            prompt=prompts[place],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_token_ids=ends,
            tool=Turns(environment(problems[place]), tokenizer, tool) if environment else tool() if tool else None,
            seed=first_seed + number,
        )
        completions[place].append(engine.submit(request))
    with Progress(called, len(read) * samples, "replies") as bar:
        while engine.has_work:
            bar.advance(sum(drawn.completion.finish is not None for drawn in engine.step()))
    return [_attempt(problem, completions.get(place), samples, tokenizer) for place, problem in enumerate(problems)]


def _attempt(problem: Problem, completions: Sequence[Completion] | None, samples: int, tokenizer: Tokenizer) -> Attempt:
    """The replies to a problem; None: its prompt was too long to be read."""
    if completions is None:
        return Attempt(problem, [""] * samples, ["no room"] * samples, [0] * samples)
    outcomes = [outcome_of(completion) for completion in completions]
    return Attempt(
        problem,
        replies=[said(each.ids, outcome, tokenizer) for each, outcome in zip(completions, outcomes, strict=True)],
        finish=["length" if completion.finish == "length" else "end" for completion in completions],
        tokens=[len(completion.ids) for completion in completions],
        outcomes=outcomes,
    )


def graders(task: Task) -> dict[str, Grader | None]:
    """The graders of a task's problems, by name: strict, flexible and checked, or its own grade alone."""
    if isinstance(task, WordProblems | Gsm8k):
        return {
            "strict": task.grade,
            "flexible": lambda problem, reply: gsm8k.grade(reply, problem.answer, "flexible"),
            "checked": lambda problem, reply: task.grade(problem, reply) and gsm8k.holds_true_notes(reply),
        }
    return {"correct": grade_of(task)}


def grade_of(task: Task) -> Grader | None:
    """The task's own grade; None where its environment has judged."""
    return None if environments_of(task) else task.grade


def majority(judged: Judged, grader: str) -> list[bool] | None:
    """For each problem, whether the commonest answer of its replies is right; None for a grader that reads no answer.

    The first of equally common ones. A reply without a number has no vote.
    """
    how = HOW.get(grader)
    if how is None:
        return None
    verdicts = []
    for attempt, right in zip(judged.attempts, judged.verdicts[grader], strict=True):
        answers = [number_in(reply, how) for reply in attempt.replies]
        votes = Counter(answer for answer in answers if answer is not None)
        verdicts.append(bool(votes) and right[answers.index(votes.most_common(1)[0][0])])
    return verdicts


def number_in(reply: str, how: gsm8k.How) -> Fraction | None:
    """The answer of a reply as a number."""
    answer = gsm8k.extract_answer(reply, how)
    return None if answer is None else gsm8k.number_of(answer)


def judge(attempts: Sequence[Attempt], by: Mapping[str, Grader | None]) -> Judged:
    """Ask every grader about every reply that was given; where there is none, an environment has earned 1 or more."""
    faults: list[Exception] = []

    def ask(grader: Grader | None, attempt: Attempt, sample: int) -> bool:
        problem = attempt.problem
        if attempt.finish[sample] == "no room":
            return False
        try:
            if grader is None:
                return is_solved(attempt.outcomes[sample])
            return bool(grader(problem, attempt.replies[sample]))
        except Exception as error:  # of someone's own task: one reply must not cost the evaluation
            if not faults:
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                say(f"grading a reply to {problem.question!r:.60} failed, so it counts as wrong: {why}")
            faults.append(error)
            return False

    verdicts = {
        name: [[ask(grader, each, sample) for sample in range(len(each.replies))] for each in attempts]
        for name, grader in by.items()
    }
    return Judged(list(attempts), verdicts, len(faults))


def is_solved(outcome: Verdict | None) -> bool:
    """Whether a conversation earned 1 or more. ValueError for one whose environment failed."""
    if not isinstance(outcome, float):
        raise ValueError(f"its environment {outcome}")
    return outcome >= 1
