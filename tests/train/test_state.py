"""Masters are what optimizers move; the model sees them rounded, and some of them with unit rows."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.variants import NormedEmbedding
from nanollm.data.batches import Batch
from nanollm.model import int4
from nanollm.model.transformer import Transformer
from nanollm.train.checkpoint import load_newest, save_checkpoint
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.train.conftest import CONFIG

EMBED = "trunk.embed.weight"
DIVISIBLE = replace(CONFIG, d_model=64, q_lora_rank=32, v_head_dim=32, d_ff=96, d_expert=32)  # by 32, for int4


def started(
    dtype: torch.dtype = torch.float32, unit_rows=(EMBED,), embedding=nn.Embedding, c=CONFIG, int4_from=None
) -> TrainState:
    model = Transformer(c)
    model.trunk.embed = embedding(c.vocab_size, c.d_model)
    return TrainState.start(model.init(0), OptimConfig(), World(dtype=dtype), unit_rows, int4_from)


def trained(state: TrainState, batches: list[Batch]) -> list[float]:
    losses = []
    for batch in batches:
        losses.append(train_step(state, [batch], next_token_loss, 1e-2, OptimConfig(), World()).loss)
        state.advance()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_and_the_bundle_have_unit_rows_and_the_masters_have_not(batch_at, dtype):
    state = started(dtype)
    for _ in range(2):
        rows = state.model.trunk.embed.weight.float()
        torch.testing.assert_close(rows.square().mean(-1), torch.ones(len(rows)), rtol=5e-3, atol=0)
        torch.testing.assert_close(state.bundle_weights()[EMBED].to(dtype), state.model.trunk.embed.weight)
        assert state.weights()[EMBED].square().mean(-1).max() < 0.1
        trained(state, [batch_at(0)])


def test_unit_rows_learn_as_a_normed_embedding_does(batch_at):
    batches = [batch_at(step) for step in range(4)]
    state, other = started(), started(unit_rows=(), embedding=NormedEmbedding)
    assert trained(state, batches) == pytest.approx(trained(other, batches), rel=1e-6)
    torch.testing.assert_close(state.weights(), other.weights(), rtol=1e-4, atol=1e-6)


def test_micro_batches_give_unit_rows_the_gradient_of_one_batch(batch_at):
    whole = batch_at(0)
    halves = [Batch(whole.tokens[rows], whole.targets[rows]) for rows in (slice(0, 2), slice(2, 4))]
    at_once, in_parts = started(), started()
    for state, batches in ((at_once, [whole]), (in_parts, halves)):
        train_step(state, batches, next_token_loss, 1e-2, OptimConfig(), World())
    torch.testing.assert_close(in_parts.weights(), at_once.weights(), rtol=1e-3, atol=1e-5)


def test_a_checkpoint_holds_the_rows_themselves(batch_at, tmp_path):
    state, later = started(), started()
    trained(state, [batch_at(0)])
    save_checkpoint(tmp_path, state, keep_last=1)
    assert load_newest(tmp_path, later, World())
    assert trained(later, [batch_at(1)]) == trained(state, [batch_at(1)])
    assert all(map(torch.equal, later.weights().values(), state.weights().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_its_step_on_the_model_sees_int4_and_the_masters_move_on(batch_at, dtype, tmp_path):
    state = started(dtype, c=DIVISIBLE, int4_from=2)
    for step in range(4):
        seen = {name: weight.float() for name, weight in state.model.state_dict().items()}
        kept, masters = state.bundle_weights(), state.weights()
        assert int4.was_trained_for_it(seen) == int4.was_trained_for_it(kept) == (step >= 2)
        assert not int4.was_trained_for_it(masters)
        if step >= 2:
            assert all(torch.equal(seen[name], kept[name]) for name, weight in masters.items() if weight.dim() > 1)
        if step == 2:  # resumed where it begins
            save_checkpoint(tmp_path, state, keep_last=1)
            state = started(dtype, c=DIVISIBLE, int4_from=2)
            assert load_newest(tmp_path, state, World())
        before = masters[EMBED].clone()
        trained(state, [batch_at(step)])
        assert not torch.equal(state.weights()[EMBED], before)


def test_gradients_go_straight_through_the_rounding(batch_at):
    state = started(unit_rows=(), c=DIVISIBLE, int4_from=0)
    rounded = Transformer(DIVISIBLE)
    rounded.load_state_dict(state.bundle_weights())
    batch = batch_at(0)
    for model in (state.model, rounded):
        next_token_loss(model, batch)[0].backward()
    for name, parameter in rounded.named_parameters():
        torch.testing.assert_close(state.masters[name].grad, parameter.grad)
