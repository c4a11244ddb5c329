"""A step does what its numbers say, and its numbers tell when something is wrong."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from nanollm.rl import grpo
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.reward import RewardConfig
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.gsm8k import Problem
from tests.rl import promises
from tests.rl.conftest import EndsSoon

FEW = RolloutConfig(prompts=4, group_size=3, max_tokens=12)


class Never(EndsSoon):
    def grade(self, problem, reply):
        return False


class Sometimes(EndsSoon):
    """Only questions with a yes can be answered rightly."""

    def grade(self, problem, reply):
        return "yes" in problem.question and len(reply) % 2 == 0


def test_engine_and_trainer_agree_before_the_first_update(make_learner):
    promises.engine_and_trainer_agree(make_learner)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "constant"])  # token_mean: test_known_bugs.py
def test_micro_batches_change_nothing(make_learner, aggregation):
    promises.micro_batches_change_nothing(make_learner, aggregation)


def test_two_steps_twice_are_the_same_bits(make_learner):
    def weights():
        learner = make_learner()
        numbers = [learner.step(step).numbers["completions/mean_length"] for step in range(2)]
        return numbers, torch.cat([p.detach().flatten() for p in learner.state.model.parameters()])

    (first, one), (second, other) = weights(), weights()
    assert first == second
    assert torch.equal(one, other)


def test_with_one_update_nothing_is_clipped_and_with_several_the_ratio_moves(make_learner):
    tight = {"clip_low": 1e-6, "clip_high": 1e-6}
    assert make_learner(objective=ObjectiveConfig(**tight)).step(0).numbers["clip_fraction"] == 0
    assert make_learner(objective=ObjectiveConfig(updates=3, **tight)).step(0).numbers["clip_fraction"] > 0.2


def test_the_divergence_from_the_reference_is_zero_at_first_and_grows(make_learner):
    policy = make_learner(objective=ObjectiveConfig(beta=0.1))
    policy.reference = make_learner().state.model.eval()
    kl = [policy.step(step).numbers["kl"] for step in range(3)]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[2] > kl[0]


def test_groups_with_equal_rewards_are_left_out_and_counted(make_learner, tmp_path):
    stats = make_learner(task=Sometimes()).step(0)
    records = [json.loads(line) for line in (tmp_path / "rollouts/step-00000001.jsonl").read_text("utf-8").splitlines()]
    dropped = [records[first : first + 3] for first in range(0, 12, 3) if not records[first]["trained"]]
    assert stats.numbers["frac_reward_zero_std"] * stats.numbers["groups"] == len(dropped) > 0
    for group in dropped:
        assert len({record["reward"] for record in group}) == 1
        assert {record["advantage"] for record in group} == {0.0}


def test_groups_with_equal_rewards_are_replaced(make_learner):
    never = RolloutConfig(prompts=4, group_size=3, max_tokens=12, resample=0)
    plain = make_learner(task=Sometimes(), rollout=never).step(0).numbers
    c = RolloutConfig(prompts=4, group_size=3, max_tokens=12, resample=5)
    numbers = make_learner(task=Sometimes(), rollout=c).step(0).numbers
    assert numbers["groups"] == 4
    assert numbers["groups_replaced"] > 0
    assert numbers["frac_reward_zero_std"] < plain["frac_reward_zero_std"]


def test_a_run_in_which_nothing_teaches_ends_with_advice(make_learner, monkeypatch):
    monkeypatch.setattr(grpo, "MAX_ZERO_VARIANCE_GROUPS", 30)
    learner = make_learner(task=Never())
    before = [p.clone() for p in learner.state.model.parameters()]
    with pytest.raises(ValueError, match=r"for 10 steps all replies .* earned the same.* nanollm sft first"):
        for step in range(20):
            assert learner.step(step).stats is None
    assert (learner.watch.steps, learner.watch.groups) == (10, 40)
    assert all(torch.equal(p, q) for p, q in zip(before, learner.state.model.parameters(), strict=True))


class Always(EndsSoon):
    def grade(self, problem, reply):
        return True


def test_a_run_in_which_everything_is_solved_goes_on(make_learner, monkeypatch):
    monkeypatch.setattr(grpo, "MAX_ZERO_VARIANCE_GROUPS", 10)
    learner = make_learner(task=Always())
    assert [learner.step(step).numbers["frac_reward_zero_std"] for step in range(12)] == [1] * 12


def test_no_problem_comes_twice_in_a_step(make_learner):
    c = RolloutConfig(prompts=8, group_size=3, max_tokens=4, resample=3)
    learner = make_learner(task=Never(), rollout=c)
    for step in range(3):
        drawn = list(learner.collector.draw(step, Counter()))
        assert len(drawn) == len({problem.question for problem in drawn}) >= 8
        assert drawn == list(learner.collector.draw(step, Counter()))


def test_problems_that_do_not_fit_are_left_out_and_counted(make_learner):
    learner = make_learner()
    long = Problem("why " * 60, "#### 1")
    few = [long, *learner.collector.problems[:9]]
    learner.collector = dataclasses.replace(learner.collector, problems=few)
    numbers = [learner.step(step).numbers for step in range(3)]
    assert all(each["groups"] == 4 for each in numbers)  # another took its place
    assert any(each["prompts_too_long"] == 1 for each in numbers)
    learner.collector = dataclasses.replace(learner.collector, problems=[long] * 8)
    with pytest.raises(ValueError, match="none of the problems of step 4 leaves room for a reply of 12 tokens"):
        learner.step(3)


def test_every_reply_is_saved_with_what_it_earned(make_learner, tmp_path):
    reward = RewardConfig(weights={"correct": 1.0, "length": 0.5}, soft_tokens=4)
    stats = make_learner(reward=reward).step(6)
    records = [json.loads(line) for line in (tmp_path / "rollouts/step-00000007.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 12
    for record in records:
        assert record["reward"] == record["parts"]["correct"] + 0.5 * record["parts"]["length"]
        assert record["parts"]["correct"] == (len(record["reply"]) % 2 == 0)
        assert record["tokens"] <= 12
    assert stats.reward == pytest.approx(sum(record["reward"] for record in records) / 12)
    assert stats.numbers["completions/clipped_ratio"] == sum(record["stop"] == "length" for record in records) / 12


def test_a_policy_that_is_rewarded_for_short_replies_learns_to_be_brief(make_learner):
    """Life: the reward rises, by the end mark's gradient alone."""
    c = RolloutConfig(prompts=8, group_size=8, max_tokens=12)
    reward = RewardConfig(weights={"length": 1.0}, soft_tokens=12)
    learner = make_learner(rollout=c, reward=reward)
    learner.lr = 2e-2
    rewards = [learner.step(step).reward for step in range(14)]
    assert sum(rewards[:3]) / 3 < -0.5
    assert sum(rewards[-3:]) / 3 > -0.2
