"""What happens in one step of group-relative policy optimization?

Straight down the page: problems, replies, rewards, advantages, rows, updates, numbers (DeepSeekMath, arXiv:2402.03300,
algorithm 1). A step depends on the weights, the seed and its number alone, so a resumed run goes on exactly, and so
does one on another number of ranks. These share the asking and grading and tell each other all of it; then they share
the training.
Letters: P prompts, G replies per prompt.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from nanollm.data.order import epoch_seed, sample_indices
from nanollm.data.packing import Layout, best_width, even_rows, pack
from nanollm.model import fused
from nanollm.model.transformer import Transformer
from nanollm.progress import say
from nanollm.rl.advantage import advantages
from nanollm.rl.loss import ObjectiveConfig, RolloutBatch, Seen, count_of, grpo_loss, policy_logprobs, token_weights
from nanollm.rl.record import Graded, reply_numbers, save_rollouts, trust_numbers
from nanollm.rl.reward import Reply, Rewards
from nanollm.rl.rollout import Group, Rollout, RolloutConfig, prompt_of, roll_out
from nanollm.rl.vllm import VllmServer
from nanollm.sources.gsm8k import Problem
from nanollm.text.chat import reply_text
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import StepStats, train_step
from nanollm.world import World

MAX_BARREN_STEPS, MAX_BARREN_GROUPS = 10, 200
"""Steps in a row, and groups in them, without one to learn from, after which a run ends with advice."""
REPLACEMENTS = 4
"""How often as many problems as a step needs are drawn to replace those that do not fit."""


@dataclass(frozen=True, kw_only=True)
class GrpoStats:
    """What a step saw."""

    step: StepStats | None  # of the last update; None: there was nothing to learn from
    numbers: dict[str, float]
    reward: float
    tokens: int  # of all replies
    skipped: bool

    @property
    def loss(self) -> float:
        return self.step.loss if self.step else 0.0

    @property
    def grad_norm(self) -> float:
        return self.step.grad_norm if self.step else 0.0

    @property
    def note(self) -> str:
        return f"reward {self.reward:.3f}"

    def values(self) -> dict[str, object]:
        """Names and values for the log."""
        return {"reward": self.reward} | self.numbers | (self.step.values() if self.step else {})


@dataclass
class Learner:
    """Everything a step needs; `step` is called with the numbers 0, 1, 2, ..."""

    state: TrainState
    tokenizer: Tokenizer
    problems: Sequence[Problem]
    rewards: Rewards
    rollout: RolloutConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    rate: Callable[[int], float]
    """Learning rate of each step."""
    micro_batch_size: int
    """Rows per forward pass if they were as wide as the context; of narrower ones as many more."""
    folder: Path
    """Where rollouts are saved."""
    seed: int
    world: World
    reference: Transformer | None = None
    """With objective.beta only."""
    server: VllmServer | None = None
    """Samples in the place of our own engine."""
    barren_steps: int = 0
    """Steps in a row without a group to learn from, and the groups in them."""
    barren_groups: int = 0

    def step(self, step: int) -> GrpoStats:
        """Sample, grade, compare, learn."""
        started = time.perf_counter()
        graded, counts = self.sample(step)
        sampled = time.perf_counter()
        totals = torch.tensor([each.totals for each in graded])  # (P, G)
        compared = advantages(totals, self.objective.advantage)
        if self.world.is_main:
            save_rollouts(self.record_of(step), graded, compared)
        faults = sum(self.world.gather(self.rewards.faults), Counter[str]())
        self.rewards.faults = Counter()
        self.watch(step, graded, faults)
        batches = portions(
            graded,
            compared,
            self.objective,
            self.rollout.max_tokens,
            self.micro_batch_size * self.state.model.config.context_length,
            is_masked=not self.is_fused,
            ranks=self.world.size,
        )
        seen: list[Seen] = []
        stats = self.update(step, list(self.world.own(batches)), seen) if batches else None
        trust = trust_numbers(
            [each for of_rank in self.world.gather([each.cpu() for each in seen]) for each in of_rank]
        )
        numbers = reply_numbers(graded) | counts | {"faults": faults.total()} | trust
        numbers |= {"rollout_s": sampled - started, "train_s": time.perf_counter() - sampled}
        return GrpoStats(
            step=stats,
            numbers=numbers,
            reward=totals.mean().item(),
            tokens=sum(len(rollout.reply_ids) for each in graded for rollout in each.group.rollouts),
            skipped=stats is not None and stats.skipped,
        )

    def record_of(self, step: int) -> Path:
        """The file with the replies of a step."""
        return self.folder / f"step-{step + 1:08d}.jsonl"

    @property
    def is_fused(self) -> bool:
        """Whether attention keeps packed texts apart without a mask."""
        return fused.serves(self.state.model.config, self.world.dtype, self.world.device)

    def sample(self, step: int) -> tuple[list[Graded], dict[str, float]]:
        """The graded groups of a step; those that teach nothing are replaced as often as `resample` allows."""
        counts: Counter[str] = Counter(prompts_too_long=0, groups_replaced=0)
        problems, roll_out = self.draw(step, counts), self.engine()
        graded: list[Graded] = []
        for attempt in range(self.rollout.resample + 1):
            kept = [each for each in graded if each.teaches]
            new = list(islice(problems, self.rollout.prompts - len(kept)))
            if not new:
                break
            counts["groups_replaced"] += len(graded) - len(kept)
            seed = reply_seed(self.seed, step, attempt)
            graded = kept + self.ask(roll_out, new, seed)
        if not graded:
            raise ValueError(
                f"none of the problems of step {step + 1} leaves room for a reply of {self.rollout.max_tokens} tokens "
                f"in the context of {self.state.model.config.context_length}; take a smaller --rollout.max_tokens or "
                f"shorter problems"
            )
        return graded, dict(counts)

    def engine(self) -> Callable[[Sequence[Problem], int], list[Group]]:
        """What replies to problems from a seed on, with the weights as they stand."""
        if self.server is None:
            model = self.state.whole_model()
            return lambda problems, seed: roll_out(model, self.tokenizer, problems, self.rollout, seed)
        server, weights = self.server, self.state.bundle_weights(keep=self.world.is_main)
        if self.world.is_main:
            server.push(weights)
        self.world.wait()  # nobody asks before the new weights are there
        return lambda problems, seed: server.roll_out(problems, self.rollout, seed)

    def ask(
        self, roll_out: Callable[[Sequence[Problem], int], list[Group]], problems: Sequence[Problem], seed: int
    ) -> list[Graded]:
        """Groups of replies to problems, graded. Each rank asks a stretch of them; all get all, in their order."""
        begin, end = (len(problems) * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        # Every reply has the seed of its place among all.
        seed += begin * self.rollout.group_size
        own = self.grade(roll_out(problems[begin:end], seed))
        return [each for of_rank in self.world.gather(own) for each in of_rank]

    def draw(self, step: int, counts: Counter[str]) -> Iterator[Problem]:
        """The problems of a step, in a fresh random order each epoch, and behind them others that may replace some.

        None comes twice, and none that does not fit; those are counted.
        """
        seen = set[int]()
        for attempt in range(self.rollout.resample + REPLACEMENTS):
            seed = epoch_seed(self.seed, -attempt) if attempt else self.seed
            for number in sample_indices(step, self.rollout.prompts, len(self.problems), seed).tolist():
                if number in seen:
                    continue
                seen.add(number)
                if self.fits(self.problems[number]):
                    yield self.problems[number]
                else:
                    counts["prompts_too_long"] += 1

    def fits(self, problem: Problem) -> bool:
        """Whether the context holds the problem and the longest reply to it."""
        room = self.state.model.config.context_length - self.rollout.max_tokens
        return len(prompt_of(problem, self.tokenizer)) <= room

    def grade(self, groups: Sequence[Group]) -> list[Graded]:
        """What every reply says and earned."""
        replies = [
            (group.problem, Reply(reply_text(each.reply_ids, self.tokenizer), len(each.reply_ids), each.stop == "end"))
            for group in groups
            for each in group.rollouts
        ]
        rewards, size = self.rewards(replies), self.rollout.group_size
        return [
            Graded(group, [reply.text for _, reply in replies[first : first + size]], rewards[first : first + size])
            for first, group in zip(range(0, len(replies), size), groups, strict=True)
        ]

    def watch(self, step: int, graded: Sequence[Graded], faults: Counter[str]) -> None:
        """Say what went wrong with rewards; end a run that has nothing to learn from."""
        if faults:
            fault, times = faults.most_common(1)[0]
            say(f"step {step + 1}: {faults.total()} parts of rewards are missing, {times} because {fault}")
        is_solved = all(reward.parts.get("correct") == 1 for each in graded for reward in each.rewards)
        if is_solved or any(each.teaches for each in graded):
            self.barren_steps = self.barren_groups = 0
            return
        self.barren_steps, self.barren_groups = self.barren_steps + 1, self.barren_groups + len(graded)
        if self.barren_steps >= MAX_BARREN_STEPS and self.barren_groups >= MAX_BARREN_GROUPS:
            totals = [total for each in graded for total in each.totals]
            cause = f", and {faults.total()} parts were missing because {faults.most_common(1)[0][0]}" if faults else ""
            raise ValueError(
                f"for {self.barren_steps} steps all replies to each problem earned the same (the last between "
                f"{min(totals):.3g} and {max(totals):.3g}{cause}), so there is nothing to learn from: train longer "
                f"with nanollm sft first, or take easier problems or a larger --rollout.group_size"
            )

    def update(self, step: int, batches: list[RolloutBatch], seen: list[Seen]) -> StepStats:
        """Move the weights `updates` times by the same rollouts."""
        temperature = self.rollout.temperature
        device = self.world.device
        if self.reference is not None:
            batches = [
                replace(b, reference_logprobs=frozen_logprobs(self.reference, b.to(device), temperature))
                for b in batches
            ]
        if self.objective.updates > 1:
            batches = [
                replace(b, old_logprobs=self.state.run(frozen_logprobs, b.to(device), temperature)) for b in batches
            ]

        def loss_of(model: Transformer, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
            loss, report, this = grpo_loss(model, batch, self.objective, temperature)
            seen.append(this)
            return loss, report

        for _ in range(self.objective.updates):
            stats = train_step(self.state, batches, loss_of, self.rate(step), self.optim, self.world)
            if stats.skipped:
                break
        return stats


def portions(
    graded: Sequence[Graded],
    compared: Tensor,
    c: ObjectiveConfig,
    max_tokens: int,
    places: int,
    *,
    is_masked: bool,
    ranks: int = 1,
) -> list[RolloutBatch]:
    """The replies that teach, packed into rows, in micro-batches that have no more than so many places.

    Every rank can take as many of them as the others; some may be empty then.

    compared (P, G): their advantages. A group that is left out has zero advantages and counts in the denominator, so
    leaving it out saves work and, but for its part of the divergence from a reference, changes nothing.
    is_masked: whether attention will need a mask (T, T) for every row.
    """
    kept = [
        (rollout, advantage)
        for each, row in zip(graded, compared.tolist(), strict=True)
        if each.teaches
        for rollout, advantage in zip(each.group.rollouts, row, strict=True)
    ]
    if not kept:
        return []
    lengths = [len(rollout.reply_ids) for each in graded for rollout in each.group.rollouts]
    count = count_of(len(lengths), sum(lengths), c.aggregation, max_tokens)
    taken = [len(rollout.prompt_ids) + len(rollout.reply_ids) - 1 for rollout, _ in kept]
    width = best_width(taken, places, is_masked=is_masked)
    rows = even_rows(-(-len(pack(taken, width)) // ranks), places // width)
    return in_rows(kept, width, rows * ranks, c.aggregation, count).portions(rows)


def in_rows(
    kept: Sequence[tuple[Rollout, float]], width: int, rows: int, aggregation: str, count: float
) -> RolloutBatch:
    """Rollouts with their advantages, packed into a multiple of `rows` rows of `width` places."""
    ids = [torch.tensor(rollout.prompt_ids + rollout.reply_ids) for rollout, _ in kept]
    layout = Layout.of([len(each) - 1 for each in ids], width, rows)
    order = layout.starts.argsort()  # replies as they stand in the rows
    rollouts = [kept[index][0] for index in order.tolist()]
    lengths = torch.tensor([len(rollout.reply_ids) for rollout in rollouts])  # (R,)
    reply = torch.arange(len(rollouts)).repeat_interleave(lengths)  # (M,)
    # The last id of a prompt predicts the first token of the reply.
    before = layout.starts[order] + torch.tensor([len(rollout.prompt_ids) - 1 for rollout in rollouts])
    return RolloutBatch(
        tokens=layout.place([each[:-1] for each in ids]),
        positions=layout.place([torch.arange(length) for length in layout.lengths]),
        places=before[reply] + torch.arange(len(reply)) - (lengths.cumsum(0) - lengths)[reply],
        targets=torch.tensor([token for rollout in rollouts for token in rollout.reply_ids]),
        reply=reply,
        advantages=torch.tensor([advantage for _, advantage in kept])[order][reply],
        weights=token_weights(lengths, aggregation)[reply],
        engine_logprobs=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
        old_logprobs=None,
        reference_logprobs=None,
        count=count,
    )


@torch.no_grad()
def frozen_logprobs(model: Transformer, batch: RolloutBatch, temperature: float) -> Tensor:
    """Log-probabilities (M,) of a model that is not trained by them."""
    with model.evaluating():
        return policy_logprobs(model, batch, temperature)[0]


def reply_seed(seed: int, step: int, attempt: int) -> int:
    """Where the seeds of a step's replies begin: far from those of every other step."""
    text = f"replies of attempt {attempt} at step {step} of {seed}"
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
