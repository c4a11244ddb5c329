"""A tiny policy, and problems that it can be asked."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nanollm.model.transformer import Transformer
from nanollm.rl.grpo import Collector, SignalWatch, make_micro_batches, open_sampler, split_groups, update_policy
from nanollm.rl.loss import ObjectiveConfig, group_advantages
from nanollm.rl.reward import RewardConfig, Rewards
from nanollm.rl.rollout import RolloutConfig, policy_metrics, rollout_metrics, save_rollouts
from nanollm.sources.environments import MakeEnvironment
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import environments_of
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import StepStats
from nanollm.world import World
from tests.model.conftest import TINY, randomised


class EndsSoon:
    """Replies are right that have an even number of characters: an untrained model earns both rewards."""

    def problems(self, split):
        return [Problem(f"Say {word} {number}!", "#### 1") for number in range(9) for word in ("yes", "no", "maybe")]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0


@dataclass(frozen=True)
class Taken:
    """What a step showed."""

    stats: StepStats | None
    numbers: dict[str, float]
    reward: float

    @property
    def values(self):
        return {"reward": self.reward} | self.numbers | (self.stats.values() if self.stats else {})


@dataclass(kw_only=True)
class Learner:
    """What a GRPO run holds, and its step, put together of the same pieces as in stages/grpo.py."""

    state: TrainState
    collector: Collector
    objective: ObjectiveConfig
    optim: OptimConfig
    rows: int
    folder: Path
    environment: MakeEnvironment | None = None
    lr: float = 1e-3
    reference: Transformer | None = None
    watch: SignalWatch = field(default_factory=SignalWatch)

    @property
    def tokenizer(self):
        return self.collector.tokenizer

    def sample(self, step):
        c, world = self.collector.c, self.collector.world
        return self.collector.collect(
            step, open_sampler(self.state, self.tokenizer, c, None, world, None, self.environment)
        )

    def step(self, step: int) -> Taken:
        c, world = self.collector.c, self.collector.world
        graded, counts = self.sample(step)
        totals = torch.tensor([each.totals for each in graded])
        advantages = group_advantages(totals, self.objective.advantage)
        if world.is_main:
            save_rollouts(self.folder / f"step-{step + 1:08d}.jsonl", graded, advantages)
        self.watch.see(step, graded, self.collector.take_faults())
        places = self.rows * self.collector.context_length
        batches = [
            make_micro_batches(*part, self.objective, c.max_tokens, places, is_masked=True, ranks=world.size)
            for part in split_groups(graded, advantages, self.objective.mini_batches)
        ]
        stats, seen = update_policy(
            self.state, batches, self.objective, c.temperature, self.lr, self.optim, world, self.reference
        )
        return Taken(stats, rollout_metrics(graded) | counts | policy_metrics(seen), totals.mean().item())


def learner_of(
    tokenizer: Tokenizer,
    folder: Path,
    world: World,
    *,
    rows=4,
    rollout=None,
    objective=None,
    task=None,
    reward=None,
    **changes,
) -> Learner:
    """A learner of a tiny model in the world's type."""
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    model = randomised(Transformer(config).init(0))
    optim = OptimConfig(name="adamw", lr=1e-3, warmup_steps=0, balance_rate=0.0, weight_decay=0.0)
    task = task or EndsSoon()
    rollout = rollout or RolloutConfig(prompts=4, group_size=3, max_tokens=12)
    collector = Collector(
        problems=task.problems("train"),
        tokenizer=tokenizer,
        rewards=Rewards(reward or RewardConfig(), task, rollout.max_tokens),
        c=rollout,
        context_length=config.context_length,
        seed=0,
        world=world,
    )
    return Learner(
        state=TrainState.start(model.to(world.dtype), optim, world),
        collector=collector,
        objective=objective or ObjectiveConfig(),
        optim=optim,
        rows=rows,
        folder=folder,
        environment=environments_of(task),
        **changes,
    )


@pytest.fixture
def make_learner(tokenizer, tmp_path):
    """A learner in one process; what is given replaces the defaults."""

    def make(dtype=torch.float32, **changes):
        return learner_of(tokenizer, tmp_path / "rollouts", World(dtype=dtype), **changes)

    return make
