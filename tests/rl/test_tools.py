"""What a tool wrote into a reply is read, and not trained."""

from dataclasses import replace

import pytest
import torch

from nanollm.rl.grpo import in_rows, make_micro_batches
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.reward import Reward
from nanollm.rl.rollout import Graded, Group, Rollout, RolloutConfig, roll_out
from nanollm.sources.gsm8k import Problem

WITH_TOOL = Rollout([1, 2], [5, 6, 7, 8], [-1.0, 0.0, 0.0, -2.0], "end", [True, False, False, True])
WITHOUT = Rollout([3], [9, 4], [-3.0, -4.0], "end", [True, True])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_only_sampled_tokens_are_predicted_weighed_and_counted(aggregation):
    batch = in_rows([[(WITH_TOOL, 1.0)], [(WITHOUT, -1.0)]], 8, 1, aggregation, 4.0)
    before = batch.tokens.flatten()[batch.token_indices]
    found = sorted(zip(before.tolist(), batch.targets.tolist(), batch.engine_logprobs.tolist(), strict=True))
    assert found == [(2, 5, -1.0), (3, 9, -3.0), (7, 8, -2.0), (9, 4, -4.0)]
    assert set(batch.tokens.flatten().tolist()) >= {6, 7}  # they are read
    assert batch.weights.tolist() == ([1.0] * 4 if aggregation == "token_mean" else [0.5] * 4)
    assert batch.reply.bincount().tolist() == [2, 2]  # the geometric mean of a reply is over these


def test_the_denominator_counts_only_sampled_tokens():
    rewards = [Reward(1.0, {}), Reward(0.0, {})]
    graded = [Graded(Group(Problem("", ""), [WITH_TOOL, replace(WITHOUT, prompt_ids=[1, 2])]), ["", ""], rewards)]
    (batch,) = make_micro_batches(graded, torch.tensor([[0.5, -0.5]]), ObjectiveConfig(), 8, 64, is_masked=False)
    assert batch.count == 4


def test_rollouts_know_what_was_sampled(make_learner):
    learner = make_learner()
    problem = learner.collector.problems[0]
    c = RolloutConfig(prompts=1, group_size=3, max_tokens=12)
    given = learner.tokenizer.encode("15>>")

    def tool():
        told = []

        def after_the_second(token):
            told.append(token)
            return given if len(told) == 2 else []

        return after_the_second

    model = learner.state.whole_model()
    (group,) = roll_out(model, learner.tokenizer, [problem], c, 3, tool)
    for rollout in group.rollouts:
        assert len(rollout.reply_ids) == len(rollout.logprobs) == len(rollout.is_sampled)
        if len(rollout.reply_ids) > 2 + len(given):
            assert rollout.reply_ids[2 : 2 + len(given)] == given
            assert rollout.is_sampled.count(False) == len(given)
