"""Routing: who computes what, with which weight, and how the load is balanced."""

import dataclasses

import pytest
import torch

from nanollm.model import moe
from nanollm.model.layers import swiglu
from nanollm.model.moe import Experts, MoE, balance_loss, dispatch, route
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised


def counts_of(chosen: torch.Tensor, n_experts: int) -> torch.Tensor:
    return chosen.flatten().bincount(minlength=n_experts)


@pytest.mark.parametrize("tokens", [1, 23, 300])
@pytest.mark.parametrize("k", [1, 2, 5])
@torch.no_grad()
def test_grouped_experts_equal_a_loop_over_tokens(rng, k, tokens):
    experts = Experts(5, 12, 20)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    x = torch.randn(tokens, 12, generator=rng)
    chosen = torch.rand(tokens, 5, generator=rng).topk(k).indices
    weights = torch.rand(tokens, k, generator=rng)
    expected = torch.zeros_like(x)
    for token in range(tokens):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            one = swiglu(x[token], experts.gate_proj[expert], experts.up_proj[expert], experts.down_proj[expert])
            expected[token] += weight * one
    answers = experts(x, chosen, weights, counts_of(chosen, 5))
    torch.testing.assert_close(answers, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [[20, 0, 30], [0, 0, 50], [17, 16, 17]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_groups_equals_expert_after_expert(rng, counts, dtype):
    experts = Experts(3, 32, 48)
    for parameter in experts.parameters():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=rng)).to(dtype)
    x = torch.randn(50, 32, generator=rng).to(dtype)
    outcomes = []
    for compute in (experts.grouped, experts.one_by_one):
        leaf = x.clone().requires_grad_()
        answers = compute(leaf, torch.tensor(counts))
        outcomes.append([answers, *torch.autograd.grad(answers.float().square().sum(), [leaf, *experts.parameters()])])
    for grouped, one_by_one in zip(*outcomes, strict=True):
        torch.testing.assert_close(grouped, one_by_one, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_the_way_to_the_experts_and_back_has_the_gradients_of_indexing(rng, k):
    x = torch.randn(9, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(9 * k, generator=rng)
    torch.autograd.gradcheck(lambda x: dispatch(x, order, order.argsort(), k), x)
    assert torch.equal(dispatch(x, order, order.argsort(), k), x[order // k])


@pytest.mark.parametrize("favourite", range(5))
def test_one_expert_may_get_every_token_and_the_others_none(tiny_model, rng, favourite):
    layer = tiny_model.trunk.blocks[1].ffn
    layer.balance_bias.zero_()[favourite] = 100.0
    x = torch.randn(2, 9, TINY.d_model, generator=rng)
    layer.train()
    layer(x)[0].sum().backward()
    assert layer.load[favourite] == 18
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_however_the_tokens_fall_few_shapes_are_computed(rng, monkeypatch):
    experts, shapes = Experts(2, 12, 20), set()
    monkeypatch.setattr(moe, "swiglu", lambda x, *_: shapes.add(len(x)) or x)
    for first in range(300, 700):
        chosen = torch.cat((torch.zeros(first), torch.ones(1000 - first))).long()[:, None]
        experts(torch.randn(1000, 12, generator=rng), chosen, torch.ones(1000, 1), counts_of(chosen, 2))
    assert len(shapes) <= 8


def test_only_chosen_experts_compute(rng):
    experts = Experts(3, 12, 20)
    for parameter in experts.parameters():
        parameter.data.fill_(0.1)[2] = torch.nan
    chosen = torch.tensor([[0], [1], [0], [1]])
    answers = experts(torch.ones(4, 12), chosen, torch.ones(4, 1), counts_of(chosen, 3))
    assert torch.isfinite(answers).all()


def test_the_bias_steers_the_choice_but_never_the_weight(rng):
    x, centroids = torch.randn(50, 8, generator=rng), torch.randn(4, 8, generator=rng)
    _, weights, scores = route(x, centroids, torch.zeros(4), k=2, normalise=False)
    experts, biased_weights, _ = route(x, centroids, torch.tensor([0.0, 0.0, 0.0, 10.0]), k=2, normalise=False)
    assert (experts == 3).any(dim=-1).all()
    torch.testing.assert_close(biased_weights, scores.gather(-1, experts))
    assert not torch.equal(weights, biased_weights)


def test_top_1_leaves_the_router_a_gradient(rng):
    c = dataclasses.replace(TINY, experts_per_token=1, norm_topk_prob=False)
    layer = Transformer(c).init(0).trunk.blocks[1].ffn
    layer(torch.randn(2, 9, c.d_model, generator=rng))[0].square().sum().backward()
    assert layer.centroids.grad.abs().max() > 0


def test_balancing_by_bias_spreads_a_collapsed_load(rng):
    x = torch.randn(1, 400, TINY.d_model, generator=rng) + 2.0  # tokens that look alike all prefer the same experts
    layer = MoE(TINY)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    layer(x)
    before = layer.load.max() / layer.load.float().mean()
    for _ in range(300):
        layer.balance(0.01)
        layer(x)
    after = layer.load.max() / layer.load.float().mean()
    assert before > 1.8
    assert after < 1.2


def test_the_load_counts_training_passes_only(tiny_model, rng):
    layer = tiny_model.trunk.blocks[1].ffn
    x = torch.randn(2, 9, TINY.d_model, generator=rng)
    layer(x)
    assert layer.load.sum() == 0
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer.load.sum() == 0
    layer(x)
    assert layer.load.sum() == 2 * 9 * TINY.experts_per_token


def test_balance_loss_is_one_when_all_share_and_larger_when_one_takes_all():
    even_scores = torch.full((1, 4, 4), 0.5)
    even = torch.tensor([[[0], [1], [2], [3]]])
    assert balance_loss(even_scores, even).item() == pytest.approx(1.0)
    skewed_scores = torch.tensor([0.9, 0.1, 0.1, 0.1]).expand(1, 4, 4)
    assert balance_loss(skewed_scores, torch.zeros(1, 4, 1, dtype=torch.int64)).item() == pytest.approx(3.0)


def test_empty_places_of_a_packed_row_count_for_no_expert(tiny_config):
    model = randomised(Transformer(tiny_config).init(0)).train()
    tokens = torch.tensor([[5, 9, 3, 44, 7, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 0, 0]])  # texts of two and three tokens, and three empty places
    model(tokens, positions=positions)
    loads = [layer.load.clone() for layer in model.moe_layers()]
    for layer in model.moe_layers():
        layer.load.zero_()
    model(tokens[:, :5], positions=positions[:, :5])
    assert all(torch.equal(layer.load, load) for layer, load in zip(model.moe_layers(), loads, strict=True))
    assert all(load.sum() == 5 * tiny_config.experts_per_token for load in loads)


def test_empty_places_change_no_balance_loss():
    scores = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    experts = scores.topk(2, dim=-1).indices
    is_text = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    got = balance_loss(scores, experts, is_text)
    torch.testing.assert_close(got[0], balance_loss(scores[:1, :4], experts[:1, :4])[0])
    torch.testing.assert_close(got[1], balance_loss(scores, experts)[1])
