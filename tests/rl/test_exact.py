"""GRPO's expected gradient is the one that enumerating every reply gives."""

import copy
import dataclasses
import math
from itertools import product

import pytest
import torch

from nanollm.model.transformer import Transformer
from nanollm.rl.grpo import frozen_logprobs, make_micro_batches, split_groups
from nanollm.rl.loss import ObjectiveConfig, group_advantages, grpo_loss
from nanollm.rl.reward import Reward
from nanollm.rl.rollout import Graded, Group, Rollout, policy_metrics
from nanollm.sources.gsm8k import Problem
from tests.rl import promises

ADVANTAGES, AGGREGATIONS = ("mean_only", "std", "batch_std"), ("token_mean", "sequence_mean", "constant")
ENGINE_CHOICES = list(product(("clip", "cispo"), ("token", "sequence"), AGGREGATIONS))


def spread(first, second, third):
    """All combinations; those beyond a Latin square, which has each pair of the first and third once, are long."""
    return [
        pytest.param(a, b, c, marks=[] if (i + k) % len(second) == j else pytest.mark.long)
        for (i, a), (j, b), (k, c) in product(enumerate(first), enumerate(second), enumerate(third))
    ]


@pytest.mark.parametrize(("advantage", "ratio", "aggregation"), spread(ADVANTAGES, ("token", "sequence"), AGGREGATIONS))
def test_the_expected_gradient_is_exact(advantage, ratio, aggregation):
    promises.the_expected_gradient_is_exact(
        ObjectiveConfig(advantage=advantage, ratio=ratio, aggregation=aggregation, clip_low=0.03, clip_high=0.05)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "cispo"},
        {"surrogate": "cispo", "cispo_max": 1.01, "ratio": "sequence"},
        {"beta": 0.3},
        {"beta": 0.3, "kl_estimator": "k3"},
    ],
    ids=str,
)
def test_the_expected_gradient_is_exact_with(options):
    promises.the_expected_gradient_is_exact(ObjectiveConfig(clip_low=0.03, clip_high=0.05, **options))


@pytest.mark.parametrize(("advantage", "share"), [("mean_only", 1 / 2), ("reward", 1)])
def test_without_options_it_is_the_gradient_of_the_expected_reward(advantage, share):
    """mean_only and constant give (G - 1) / G of the policy gradient, divided by the longest reply's tokens."""
    prompts, replies = [[1, 2, 1]], promises.all_replies(3)
    policy = promises.tiny_policy(3, 0)
    c = ObjectiveConfig(advantage=advantage, aggregation="constant")
    got = promises.by_our_batches(policy, policy, policy, policy, prompts, replies, 2, c)
    policy.zero_grad()
    probabilities = [promises.logprobs_of(policy, prompts[0], reply).sum().exp() for reply in replies]
    assert sum(probabilities).item() == pytest.approx(1)
    rewards = [promises.reward_of(prompts[0], reply) for reply in replies]
    expected_reward = sum(p * r for p, r in zip(probabilities, rewards, strict=True))
    (-expected_reward * share / promises.MAX_TOKENS).backward()
    torch.testing.assert_close(got, promises.grads_of(policy), atol=1e-6, rtol=1e-6)


def test_the_divergence_has_its_own_gradient():
    promises.the_divergence_has_its_own_gradient(ObjectiveConfig(beta=0.3))


def test_mini_batches_are_steps_on_their_groups_alone_and_one_is_all(make_learner):
    learner = make_learner()
    graded, _ = learner.sample(0)
    advantages = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")

    def made(count, graded=graded, advantages=advantages):
        c = ObjectiveConfig(mini_batches=count)
        parts = split_groups(graded, advantages, c.mini_batches)
        return [make_micro_batches(*part, c, 12, 4096, is_masked=True) for part in parts]

    (whole,) = made(1)
    same = make_micro_batches(graded, advantages, ObjectiveConfig(), 12, 4096, is_masked=True)
    halves = [part for begin in (0, 2) for part in made(1, graded[begin : begin + 2], advantages[begin : begin + 2])]
    for got, expected in ((whole, same), *zip(made(2), halves, strict=True)):
        for one, other in zip(got, expected, strict=True):
            assert one.count == other.count
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.advantages, other.advantages)


def test_ratios_of_every_mini_batch_are_to_the_policy_before_the_first(make_learner):
    tight = {"clip_low": 1e-6, "clip_high": 1e-6}
    assert make_learner(objective=ObjectiveConfig(mini_batches=4, **tight)).step(0).numbers["clip_fraction"] > 0.2


def test_truncated_replies_are_left_out(make_learner):
    promises.truncated_replies_are_left_out(make_learner)


def near(policy: Transformer, seed: int, share: float) -> Transformer:
    """Another model that says nearly the same."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter, away in zip(other.parameters(), promises.tiny_policy(3, seed).parameters(), strict=True):
            parameter += share * away
    return other


@pytest.mark.parametrize(
    ("surrogate", "ratio", "aggregation"),
    [pytest.param(*each, marks=[] if each[2] == "constant" else pytest.mark.long) for each in ENGINE_CHOICES],
)
def test_the_expected_gradient_is_exact_where_another_engine_samples(surrogate, ratio, aggregation):
    """Some ratios of trainer and engine are above the cap, some below."""
    c = ObjectiveConfig(
        surrogate=surrogate,
        ratio=ratio,
        aggregation=aggregation,
        beta=0.3,
        clip_low=0.03,
        clip_high=0.05,
        importance_cap=1.1,
    )
    promises.the_expected_gradient_is_exact(c, engine=near(promises.tiny_policy(3, 0), seed=4, share=0.2))


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("is_first_update", [True, False])
def test_replies_of_another_engine_give_the_gradient_of_the_policys_own(surrogate, is_first_update, monkeypatch):
    """Replies of one token: with more, those before it would need their weights too. Without the cap it is exact."""
    monkeypatch.setattr(promises, "reward_of", lambda prompt, reply: (0.0, 1.0, 0.25)[reply[0]])
    prompts, replies = [[1, 2, 1]], [[0], [1], [2]]
    policy = promises.tiny_policy(3, 0)
    engine = near(policy, seed=4, share=0.3)

    def gradient(by, cap):
        c = ObjectiveConfig(surrogate=surrogate, aggregation="constant", importance_cap=cap)
        old = None if is_first_update else policy
        return promises.by_our_batches(policy, old, policy, by, prompts, replies, 2, c)

    expected = gradient(policy, 0)
    torch.testing.assert_close(gradient(engine, float("inf")), expected, atol=1e-6, rtol=1e-5)
    off = [(gradient(engine, cap) - expected).norm() for cap in (0, 1.0)]
    assert min(off) > 0.02 * expected.norm()  # uncorrected, or cut too low, it is another


def test_an_engine_that_is_off_by_a_known_factor_is_weighed_by_it_up_to_the_cap(make_learner):
    learner = make_learner()
    graded, _ = learner.sample(0)
    compared = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")
    model = learner.state.model
    for updates in (1, 2):
        c = ObjectiveConfig(updates=updates, importance_cap=2.0)
        (batch,) = make_micro_batches(graded, compared, c, 12, 4096, is_masked=True)
        true = frozen_logprobs(model, batch, 1.0)
        batch = dataclasses.replace(batch, old_logprobs=true if updates > 1 else None)

        def gradient(factor, c, batch=batch, true=true):
            """Where the engine says that every token was that many times less likely than it was."""
            model.zero_grad()
            off = dataclasses.replace(batch, engine_logprobs=true - math.log(factor))
            loss, _, seen = grpo_loss(model, off, c, 1.0)
            loss.backward()
            return promises.grads_of(model), policy_metrics([seen])

        plain, _ = gradient(1.5, ObjectiveConfig(updates=updates))
        for factor, weight, truncated in ((1.5, 1.5, 0), (0.25, 0.25, 0), (8.0, 2.0, 1)):
            weighed, numbers = gradient(factor, c)
            torch.testing.assert_close(weighed, weight * plain, atol=1e-4, rtol=1e-3)
            assert numbers["sampling/importance_sampling_ratio/mean"] == pytest.approx(weight, rel=1e-4)
            assert numbers["sampling/importance_sampling_ratio/capped"] == truncated
        higher, numbers = gradient(8.0, dataclasses.replace(c, importance_cap=10.0))
        torch.testing.assert_close(higher, 8 * plain, atol=1e-4, rtol=1e-3)
        assert numbers["sampling/importance_sampling_ratio/capped"] == 0


@pytest.mark.parametrize("off", [None, 0.0])
def test_without_a_cap_the_engine_changes_no_bit(make_learner, off):
    learner = make_learner()
    graded, _ = learner.sample(0)
    compared = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")
    c = ObjectiveConfig(importance_cap=off)
    (batch,) = make_micro_batches(graded, compared, c, 12, 4096, is_masked=True)
    gradients = []
    for shift in (0.0, 3.0, -3.0):
        learner.state.model.zero_grad()
        shifted = dataclasses.replace(batch, engine_logprobs=batch.engine_logprobs + shift)
        grpo_loss(learner.state.model, shifted, c, 1.0)[0].backward()
        gradients.append(promises.grads_of(learner.state.model))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("cap", [0.5, -1.0, float("nan")])
def test_a_cap_that_would_cut_what_is_right_is_refused(cap):
    with pytest.raises(ValueError, match=r"objective.importance_cap must be at least 1, or 0 \(off\), got"):
        ObjectiveConfig(importance_cap=cap)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_micro_batch_without_a_reply_adds_nothing(make_learner, ratio):
    """Several ranks take equally many micro-batches, the last of which may be empty."""
    learner = make_learner()
    graded, _ = learner.sample(0)
    compared = group_advantages(torch.tensor([each.totals for each in graded]), "mean_only")
    c = ObjectiveConfig(ratio=ratio, importance_cap=2.0)
    (batch,) = make_micro_batches(graded, compared, c, 12, 4096, is_masked=True)
    rows, width = batch.tokens.shape
    blank = torch.zeros(rows, width, dtype=torch.int64)
    longer = dataclasses.replace(
        batch, tokens=torch.cat((batch.tokens, blank)), positions=torch.cat((batch.positions, blank))
    )
    full, empty = longer.split_micro_batches(rows)
    assert torch.equal(full.targets, batch.targets)
    loss, _, seen = grpo_loss(learner.state.model, empty, c, 1.0)
    loss.backward()
    assert (loss.item(), seen.tokens, seen.engine_difference_max.item()) == (0, 0, 0)
    assert not promises.grads_of(learner.state.model).any()


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_rewards_leave_no_rest_of_rounding_to_learn_from(advantage):
    rewards = torch.full((1, 7), 0.1)
    rewards = torch.cat((rewards, torch.arange(7.0)[None]))
    equal, different = group_advantages(rewards, advantage)
    assert not equal.any()
    assert different.any()


def test_without_comparison_a_group_of_right_replies_is_trained_on_and_one_of_wrong_ones_is_not():
    rollouts = [Rollout([1], [token, promises.END_ID], [-1.0, -1.0], "end", [True, True]) for token in (3, 4)]
    graded = [Graded(Group(Problem("", ""), rollouts), ["", ""], [Reward(each, {})] * 2) for each in (1.0, 0.0)]
    totals = torch.tensor([each.totals for each in graded])
    for kind, trained in (("reward", 4), ("mean_only", 0)):
        c = ObjectiveConfig(advantage=kind)
        batches = make_micro_batches(graded, group_advantages(totals, kind), c, 2, 64, is_masked=False)
        assert sum(len(batch.targets) for batch in batches) == trained
