"""GRPO's expected gradient is the one that enumerating every reply gives."""

from itertools import product

import pytest
import torch

from nanollm.rl.loss import ObjectiveConfig
from tests.rl import promises

CHOICES = list(
    product(("mean_only", "std", "batch_std"), ("token", "sequence"), ("token_mean", "sequence_mean", "constant"))
)


@pytest.mark.parametrize(("advantage", "ratio", "aggregation"), CHOICES)
def test_the_expected_gradient_is_exact(advantage, ratio, aggregation):
    promises.the_expected_gradient_is_exact(
        ObjectiveConfig(advantage=advantage, ratio=ratio, aggregation=aggregation, clip_low=0.03, clip_high=0.05)
    )


@pytest.mark.parametrize(
    "options",
    [{"surrogate": "cispo"}, {"surrogate": "cispo", "cispo_max": 1.01, "ratio": "sequence"}, {"beta": 0.3}],
    ids=str,
)
def test_the_expected_gradient_is_exact_with(options):
    promises.the_expected_gradient_is_exact(ObjectiveConfig(clip_low=0.03, clip_high=0.05, **options))


def test_without_options_it_is_the_gradient_of_the_expected_reward():
    """mean_only and constant give (G - 1) / G of the policy gradient, divided by the longest reply's tokens."""
    prompts, replies = [[1, 2, 1]], promises.all_replies(3)
    policy = promises.tiny_policy(3, 0)
    c = ObjectiveConfig(advantage="mean_only", aggregation="constant")
    got = promises.by_our_batches(policy, policy, policy, prompts, replies, 2, c)
    policy.zero_grad()
    probabilities = [promises.logprobs_of(policy, prompts[0], reply).sum().exp() for reply in replies]
    assert sum(probabilities).item() == pytest.approx(1)
    rewards = [promises.reward_of(prompts[0], reply) for reply in replies]
    expected_reward = sum(p * r for p, r in zip(probabilities, rewards, strict=True))
    (-expected_reward / 2 / promises.MAX_TOKENS).backward()
    torch.testing.assert_close(got, promises.grads_of(policy), atol=1e-6, rtol=1e-6)
