"""The loss is a sum and a count, and chunks change nothing."""

import copy

import torch
from torch.nn import functional as F

from nanollm.data.batches import IGNORE
from nanollm.train import loss
from nanollm.train.loss import cross_entropy_sum, next_token_loss


def test_chunks_give_the_same_loss_and_gradients(start, batch_at, monkeypatch):
    batch = batch_at(0)
    batch.targets[1, 3:9] = IGNORE
    grads, sums = [], []
    for limit in (2**26, 61 * 7):  # all at once; seven rows of logits at a time
        monkeypatch.setattr(loss, "MAX_LOGITS", limit)
        state = start()
        total, reported = next_token_loss(state.model, batch)
        total.backward()
        sums.append(reported)
        grads.append([parameter.grad for parameter in state.model.parameters()])
    torch.testing.assert_close(*sums, rtol=1e-6, atol=0)
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_the_sum_is_cross_entropy_over_trained_targets_only(start, batch_at):
    model, batch = start().model, batch_at(0)
    batch.targets[:, 5:] = IGNORE
    logits = model(batch.tokens)
    expected = F.cross_entropy(logits[:, :5].flatten(0, 1), batch.targets[:, :5].flatten(), reduction="sum")
    got = cross_entropy_sum(model.head, model.trunk(batch.tokens), batch.targets)
    torch.testing.assert_close(got, expected)
    assert batch.count == 20


def test_untrained_targets_have_no_gradient_at_all(start, batch_at):
    model, batch = start().model, batch_at(0)
    batch.targets[:, 5:] = IGNORE
    hidden = model.trunk(batch.tokens).detach().requires_grad_()
    cross_entropy_sum(model.head, hidden, batch.targets).backward()
    assert (hidden.grad[:, 5:] == 0).all()
    assert (hidden.grad[:, :5] != 0).any()


def test_the_balance_loss_trains_the_router_and_is_not_reported(start, batch_at):
    model, batch = start().model, batch_at(0)
    plain, report = next_token_loss(model, batch)
    balanced, balanced_report = next_token_loss(model, batch, balance_weight=0.5)
    torch.testing.assert_close(report, balanced_report)
    layers = list(model.moe_layers())
    for layer in layers:
        layer.wants_balance_losses = True
    model(batch.tokens)
    expected = 0.5 * 16 * sum(layer.balance_losses.sum() for layer in layers)
    torch.testing.assert_close(balanced - plain, expected)
    model.zero_grad()
    (balanced - plain).backward()
    assert all(layer.centroids.grad.abs().max() > 0 for layer in layers)


def test_without_a_balance_loss_nothing_of_it_is_computed_or_kept(start, batch_at):
    model = start().model
    for weight in (0.5, 0.0):
        next_token_loss(model, batch_at(0), balance_weight=weight)
        assert all(layer.balance_losses is None for layer in model.moe_layers())
    copy.deepcopy(model)  # as a reference model is made
