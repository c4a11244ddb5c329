"""One optimizer step: what it divides by, what it refuses, what it moves."""

import math

import pytest
import torch

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.layers import SwiGLU
from nanollm.model.transformer import Transformer
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.model.conftest import TINY


def rows_of(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.tokens[rows], batch.targets[rows])


def assert_same_gradients(state: TrainState, other: TrainState) -> None:
    """Compare the first moments, which are the gradients times a constant after one step."""
    for optimizer, other_optimizer in zip(state.optimizers, other.optimizers, strict=True):
        for slots, other_slots in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
            kind = "exp_avg" if "exp_avg" in slots else "momentum_buffer"
            torch.testing.assert_close(slots[kind], other_slots[kind], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("balance_weight", [0.0, 0.1])
def test_micro_batches_equal_one_batch(start, batch_at, name, balance_weight):
    whole = batch_at(0)
    whole.targets[0, 1:] = IGNORE  # the first micro-batch trains 17 tokens, the second 32
    c = OptimConfig(name=name, balance_weight=balance_weight)

    def loss_of(model, batch):
        return next_token_loss(model, batch, balance_weight)

    at_once, in_parts = start(name=name), start(name=name)
    expected = train_step(at_once, [whole], loss_of, 1e-2, c, World())
    got = train_step(in_parts, [rows_of(whole, slice(0, 2)), rows_of(whole, slice(2, 4))], loss_of, 1e-2, c, World())
    assert got.tokens == expected.tokens == 49
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert got.expert_load == expected.expert_load
    assert_same_gradients(at_once, in_parts)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_weights(start, batch_at, where, bad):
    state = start()
    before = {name: tensor.clone() for name, tensor in state.weights().items()}

    def poisoned(model, batch):
        loss, report = next_token_loss(model, batch)
        if where == "loss":
            return loss * bad, report * bad
        return loss + (model.head.weight[0, 0] * bad - (model.head.weight[0, 0] * bad).detach()), report

    stats = train_step(state, [batch_at(0)], poisoned, 1e-2, OptimConfig(), World())
    assert stats.skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.weights().items())
    stats = train_step(state, [batch_at(1)], next_token_loss, 1e-2, OptimConfig(), World())
    assert not stats.skipped
    assert all(torch.isfinite(tensor).all() for tensor in state.weights().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_is_always_the_rounding_of_its_float32_masters(start, batch_at, dtype):
    state = start(dtype)
    for step in range(3):
        stats = train_step(state, [batch_at(step)], next_token_loss, 1e-2, OptimConfig(), World())
        assert not stats.skipped
    for name, parameter in state.model.named_parameters():
        assert parameter.dtype == dtype
        assert state.masters[name].dtype == torch.float32
        assert torch.equal(parameter, state.masters[name].to(dtype))
        assert not torch.equal(state.masters[name].to(dtype).float(), state.masters[name]) or parameter.dim() == 1
    assert all(layer.balance_bias.dtype == torch.float32 for layer in state.model.moe_layers())


def test_bfloat16_gradients_are_close_to_float32_gradients(start, batch_at):
    norms = [
        train_step(start(dtype), [batch_at(0), batch_at(1)], next_token_loss, 0.0, OptimConfig(), World()).grad_norm
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert norms[2] == pytest.approx(norms[0], rel=0.01)


def test_float16_halves_its_loss_scale_after_an_overflow_and_goes_on(start, batch_at):
    state = start(torch.float16)
    state.loss_scale = 2.0**24
    skipped = [
        train_step(state, [batch_at(0)], next_token_loss, 1e-2, OptimConfig(), World()).skipped for _ in range(16)
    ]
    assert skipped[0]
    assert not skipped[-1]
    assert state.loss_scale < 2.0**24


def test_one_batch_is_overfitted(start, batch_at):
    state, batch = start(), batch_at(0)
    losses = [train_step(state, [batch], next_token_loss, 1e-2, OptimConfig(), World()).loss for _ in range(90)]
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < 0.05


def test_clipping_bounds_the_move_and_reports_the_norm_before(start, batch_at):
    free, clipped = start(name="adamw"), start(name="adamw")
    limit = OptimConfig(name="adamw", max_grad_norm=1e-9, weight_decay=0.0)
    norm = train_step(
        free, [batch_at(0)], next_token_loss, 1e-2, OptimConfig(name="adamw", max_grad_norm=0), World()
    ).grad_norm
    start_weights = [p.clone() for p in clipped.model.parameters()]
    assert train_step(clipped, [batch_at(0)], next_token_loss, 1e-2, limit, World()).grad_norm == norm > 1e-9
    moves = [(p - q).abs().max() for p, q in zip(clipped.model.parameters(), start_weights, strict=True) if p.dim() < 2]
    assert max(moves) < 1e-3  # gradients far below AdamW's epsilon hardly move anything


def test_expert_shares_sum_to_one_and_the_bias_follows_them(start, batch_at):
    state = start()
    stats = train_step(state, [batch_at(0)], next_token_loss, 1e-2, OptimConfig(balance_rate=0.5), World())
    for shares, layer in zip(stats.expert_load, state.model.moe_layers(), strict=True):
        assert sum(shares) == pytest.approx(1)
        expected = [0.5 * ((share < 1 / 5) - (share > 1 / 5)) for share in shares]
        assert layer.balance_bias.tolist() == pytest.approx(expected)
        assert layer.load.sum() == 0


def test_a_model_without_experts_has_no_load(batch_at):
    model = Transformer(TINY)
    for block in model.trunk.blocks:
        block.ffn = SwiGLU(TINY.d_model, TINY.d_ff)
    state = TrainState.start(model.init(0), OptimConfig(), World())
    stats = train_step(state, [batch_at(0)], next_token_loss, 1e-2, OptimConfig(), World())
    assert stats.expert_load == []
    assert "expert_load" not in stats.values()
