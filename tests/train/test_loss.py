"""The loss is a sum and a count; chunks change nothing, and the logits of all tokens are never there."""

import copy
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from nanollm.data.batches import IGNORE
from nanollm.model.moe import balance_loss
from nanollm.train import loss
from nanollm.train.loss import (
    _logits_to_grad,
    _logits_to_grad_fused,
    cross_entropy_sum,
    next_token_loss,
    token_logprobs,
)

VOCAB = 61


@pytest.fixture
def case():
    """A head, hidden states of 3 x 50 tokens and their targets: case(dtype)."""

    def make(dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        head = nn.Linear(16, VOCAB, bias=False).to(dtype)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        hidden = torch.randn(3, 50, 16, generator=generator).to(dtype).requires_grad_()
        return head, hidden, torch.randint(VOCAB, (3, 50), generator=generator)

    return make


@pytest.fixture(params=["one chunk", "chunks of 64 rows, seven at a time"])
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(loss, "MAX_LOGITS", VOCAB * 64)
        monkeypatch.setattr(loss, "IN_CACHE", VOCAB * 7)


def with_gradients(head, hidden, value):
    """The value, and the gradients of hidden and head."""
    hidden.grad = head.weight.grad = None
    value.backward()
    return value.detach(), hidden.grad, head.weight.grad


def by_whole_logits(head, hidden, targets, temperature=1.0):
    """Log-probabilities of the targets and entropies, (N,) each, in the type of hidden."""
    logprobs = (head(hidden.flatten(0, 1)) / temperature).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.flatten()[:, None].clamp(min=0))[:, 0], entropies


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_sum_and_its_gradients_are_those_of_whole_logits(case, chunks, ignored, dtype, precision):
    head, hidden, targets = case(dtype)
    if ignored != "none":
        targets[1, 3:30] = IGNORE
        targets[2 if ignored == "some" else slice(None)] = IGNORE
    whole = F.cross_entropy(head(hidden.flatten(0, 1)), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = with_gradients(head, hidden, 0.3 * whole)
    got = with_gradients(head, hidden, 0.3 * cross_entropy_sum(head, hidden, targets))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=precision, atol=precision)
    with torch.no_grad():
        torch.testing.assert_close(0.3 * cross_entropy_sum(head, hidden, targets), got[0], rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_log_probabilities_and_their_gradients_are_those_of_whole_logits(case, chunks, dtype, precision):
    head, hidden, targets = case(dtype)
    weights = torch.linspace(-1, 1, targets.numel(), dtype=dtype)
    logprobs, entropies = token_logprobs(head, hidden.flatten(0, 1), targets.flatten(), 0.7)
    assert not entropies.requires_grad
    expected, expected_entropies = by_whole_logits(head, hidden, targets, 0.7)
    torch.testing.assert_close(logprobs, expected, rtol=precision, atol=precision)
    torch.testing.assert_close(entropies, expected_entropies, rtol=precision, atol=precision)
    got = with_gradients(head, hidden, (weights * logprobs).sum())
    for ours, theirs in zip(got, with_gradients(head, hidden, (weights * expected).sum()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=precision, atol=10 * precision)
    with torch.no_grad():
        frozen, _ = token_logprobs(head, hidden.flatten(0, 1), targets.flatten(), 0.7)
    torch.testing.assert_close(frozen, logprobs, rtol=0, atol=0)


def test_bfloat16_is_close_to_float32(case, chunks):
    head, hidden, targets = case(torch.bfloat16)
    wide_head, wide_hidden = copy.deepcopy(head).float(), hidden.detach().float().requires_grad_()
    for of in (
        lambda head, hidden: cross_entropy_sum(head, hidden, targets),
        lambda head, hidden: token_logprobs(head, hidden.flatten(0, 1), targets.flatten(), 0.7)[0].sum(),
    ):
        got = with_gradients(head, hidden, of(head, hidden))
        assert got[0].dtype == torch.float32
        for ours, theirs in zip(got, with_gradients(wide_head, wide_hidden, of(wide_head, wide_hidden)), strict=True):
            assert (ours - theirs).norm() < 5e-3 * theirs.norm()


def test_the_sum_of_the_heads_gradient_does_not_drift_with_the_number_of_chunks(case, monkeypatch):
    """Forty chunks that were added up in bfloat16 would be five times as wrong as one."""
    generator = torch.Generator().manual_seed(0)
    head, _, _ = case(torch.bfloat16)
    hidden = torch.randn(1, 2560, 16, generator=generator).bfloat16()
    targets = torch.randint(VOCAB, (1, 2560), generator=generator)
    weight = head.weight.detach().double().requires_grad_()
    F.cross_entropy(hidden[0].double() @ weight.T, targets[0]).backward()
    errors = []
    for limit in (2**26, VOCAB * 64):
        monkeypatch.setattr(loss, "MAX_LOGITS", limit)
        head.weight.grad = None
        (cross_entropy_sum(head, hidden, targets) / 2560).backward()
        errors.append((head.weight.grad - weight.grad).norm() / weight.grad.norm())
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_has_no_gradient_and_changes_no_other(case, chunks, frozen):
    head, hidden, targets = case(torch.float32)
    _, of_hidden, of_head = with_gradients(head, hidden, cross_entropy_sum(head, hidden, targets))
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    _, *got = with_gradients(head, hidden, cross_entropy_sum(head, hidden, targets))
    for now, before in zip(got, (of_hidden, of_head), strict=True):
        assert now is None or torch.equal(now, before)
    assert (got[0] is None, got[1] is None) == (frozen == "hidden", frozen == "head")


def allocated_bytes(work) -> int:
    """The most that all tensors made by this work took together."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(sizes))


@pytest.mark.parametrize("of", ["cross entropy", "log-probabilities"])
def test_the_logits_of_all_tokens_are_never_there(monkeypatch, of):
    """8,192 tokens and 8,192 words: 256 MiB of float32 logits, in chunks of 2 MiB."""
    monkeypatch.setattr(loss, "MAX_LOGITS", 2**19)
    monkeypatch.setattr(loss, "IN_CACHE", 2**17)
    tokens = vocab = 8192
    head = nn.Linear(8, vocab, bias=False)
    hidden = torch.randn(1, tokens, 8, requires_grad=True)
    targets = torch.randint(vocab, (1, tokens))

    def work():
        if of == "cross entropy":
            cross_entropy_sum(head, hidden, targets).backward()
        else:
            token_logprobs(head, hidden[0], targets[0], 1.0)[0].sum().backward()

    chunk, cached = 4 * loss.MAX_LOGITS, 4 * loss.IN_CACHE
    gradients = 4 * 8 * (tokens + vocab)  # of hidden and head
    bound = chunk + 3 * cached + 4 * gradients + 40 * tokens
    assert chunk < allocated_bytes(work) < bound < 4 * tokens * vocab / 40


def test_untrained_targets_have_no_gradient_at_all(start, batch_at):
    model, batch = start().model, batch_at(0)
    batch.targets[:, 5:] = IGNORE
    hidden = model.trunk(batch.tokens).detach().requires_grad_()
    cross_entropy_sum(model.head, hidden, batch.targets).backward()
    assert (hidden.grad[:, 5:] == 0).all()
    assert (hidden.grad[:, :5] != 0).any()
    assert batch.count == 20


def test_the_balance_loss_trains_the_router_and_is_not_reported(start, batch_at):
    model, batch = start().model, batch_at(0)
    plain, report = next_token_loss(model, batch)
    balanced, balanced_report = next_token_loss(model, batch, balance_weight=0.5)
    torch.testing.assert_close(report, balanced_report)
    _, routings = model.trunk.routed(batch.tokens)
    expected = 0.5 * 16 * sum(balance_loss(routing.scores, routing.experts).sum() for routing in routings)
    torch.testing.assert_close(balanced - plain, expected)
    model.zero_grad()
    (balanced - plain).backward()
    assert all(layer.centroids.grad.abs().max() > 0 for layer in model.moe_layers())


def test_sums_that_leave_float16_come_back_once_they_are_divided():
    head = nn.Linear(4, 3, bias=False).half()
    hidden = torch.full((1, 40_000, 4), 8.0, dtype=torch.float16)
    targets = torch.zeros(1, 40_000, dtype=torch.int64)
    (cross_entropy_sum(head, hidden, targets) / targets.numel()).backward()
    right = copy.deepcopy(head).float()
    right.weight.grad = None
    F.cross_entropy(right(hidden[0, :1].float()), targets[0, :1]).backward()
    torch.testing.assert_close(head.weight.grad.float(), right.weight.grad, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_what_is_written_for_a_compiler_turns_logits_into_the_same_errors(dtype, error):
    rng = torch.Generator().manual_seed(0)
    logits, targets = (8 * torch.randn(6, 50, generator=rng)).to(dtype), torch.randint(50, (6, 1), generator=rng)
    fused, plain = logits.clone(), logits.clone()
    torch.testing.assert_close(_logits_to_grad_fused(fused, targets), _logits_to_grad(plain, targets, True))
    torch.testing.assert_close(fused, plain, rtol=error, atol=error)
    assert not torch.equal(plain, logits)
