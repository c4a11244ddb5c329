"""A tiny policy, and problems that it can be asked."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanollm.model.transformer import Transformer
from nanollm.rl.grpo import Learner
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.reward import RewardConfig, Rewards
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.gsm8k import Problem
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.world import World
from tests.model.conftest import TINY, randomised


class EndsSoon:
    """Replies are right that have an even number of characters: an untrained model earns both rewards."""

    def problems(self, split):
        return [Problem(f"Say {word} {number}!", "#### 1") for number in range(9) for word in ("yes", "no", "maybe")]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0


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
    return Learner(
        state=TrainState.start(model.to(world.dtype), optim, world),
        tokenizer=tokenizer,
        problems=task.problems("train"),
        rewards=Rewards(reward or RewardConfig(), task, rollout.max_tokens),
        rollout=rollout,
        objective=objective or ObjectiveConfig(),
        optim=optim,
        rate=lambda step: 1e-3,
        micro_batch_size=rows,
        folder=folder,
        seed=0,
        world=world,
        **changes,
    )


@pytest.fixture
def make_learner(tokenizer, tmp_path):
    """A learner in one process; what is given replaces the defaults."""

    def make(dtype=torch.float32, **changes):
        return learner_of(tokenizer, tmp_path / "rollouts", World(dtype=dtype), **changes)

    return make
