"""Distillation by enumeration: every reply, every gradient; and the mistakes that others made, put back."""

import pytest
import torch

from nanollm.data.batches import IGNORE, Batch
from nanollm.rl import distill, grpo
from nanollm.rl.rollout import Rollout
from tests.rl.promises import MAX_TOKENS, TEMPERATURE, all_replies, grads_of, logprobs_of, tiny_policy

PROMPT = [1, 2, 1]


def models():
    """Student and teacher of a vocabulary of three."""
    return tiny_policy(3, 0), tiny_policy(3, 5)


def next_logprobs(model, ids):
    return (model(torch.tensor([ids]))[0, -1] / TEMPERATURE).log_softmax(-1)


def expected_over_replies(credit):
    """Loss of every reply, weighted by how likely it is, as a sampler would meet it: the gradient of our batches."""
    student, teacher = models()
    replies = all_replies(3)
    with torch.no_grad():
        likely = [logprobs_of(student, PROMPT, reply).sum().exp() for reply in replies]
    rollouts = [Rollout(PROMPT, reply, [0.0] * len(reply), "end", [True] * len(reply)) for reply in replies]
    for rollout, probability in zip(rollouts, likely, strict=True):
        # Two replies behind one prompt, of which the second only stands there: it must change nothing.
        batch = grpo.in_rows([[(rollout, 1.0), (rollouts[0], 1.0)]], 8, 1, "token_mean", MAX_TOKENS)
        alone = grpo.in_rows([[(rollouts[0], 1.0)]], 8, 1, "token_mean", MAX_TOKENS)
        for part, sign in ((batch, 1), (alone, -1)):
            loss, _ = distill.on_policy_loss(student, part, teacher=teacher, temperature=TEMPERATURE, credit=credit)
            (sign * probability * loss).backward()
    return grads_of(student)


def the_gradient_is_that_of_kl_between_replies():
    student, teacher = models()
    divergence = torch.zeros((), dtype=torch.float64)
    for reply in all_replies(3):
        own, other = (logprobs_of(model, PROMPT, reply).sum() for model in (student, teacher))
        divergence = divergence + own.exp() * (own - other.detach())
    divergence.backward()
    torch.testing.assert_close(expected_over_replies("reply"), grads_of(student), atol=1e-6, rtol=1e-6)


def test_the_expected_gradient_is_that_of_kl_between_replies():
    the_gradient_is_that_of_kl_between_replies()


def test_each_token_answers_for_its_own_place_alone():
    student, teacher = models()
    total = torch.zeros((), dtype=torch.float64)
    for prefix in ([], [1], [2]):  # where a next token is drawn, and how likely that place is reached
        with torch.no_grad():
            reached = logprobs_of(student, PROMPT, prefix).sum().exp() if prefix else 1.0
            theirs = next_logprobs(teacher, PROMPT + prefix)
        ours = next_logprobs(student, PROMPT + prefix)
        total = total + reached * (ours.exp() * (ours - theirs)).sum()
    total.backward()
    torch.testing.assert_close(expected_over_replies("token"), grads_of(student), atol=1e-6, rtol=1e-6)


def on_texts(ce_weight, recompute=False):
    """Gradient and loss over a row of two texts, of which some targets are learned."""
    student, teacher = models()
    tokens, positions = torch.tensor([[1, 2, 1, 2, 1]]), torch.tensor([[0, 1, 2, 0, 1]])
    targets = torch.tensor([[IGNORE, 1, 0, IGNORE, 2]])
    loss, reported = distill.logits_loss(
        student,
        Batch(tokens, targets, positions),
        teacher=teacher,
        temperature=TEMPERATURE,
        ce_weight=ce_weight,
        recompute=recompute,
    )
    assert torch.equal(loss, reported)
    loss.backward()
    return grads_of(student), loss


def forward_kl_on_texts_is_exact(ce_weight=0.25):
    student, teacher = models()
    total = torch.zeros((), dtype=torch.float64)
    for ids, target in (([1, 2], 1), ([1, 2, 1], 0), ([2, 1], 2)):
        theirs, ours = next_logprobs(teacher, ids).detach(), next_logprobs(student, ids)
        total = total + (1 - ce_weight) * (theirs.exp() * (theirs - ours)).sum() - ce_weight * ours[target]
    total.backward()
    gradient, loss = on_texts(ce_weight)
    torch.testing.assert_close(loss, total, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient, grads_of(student), atol=1e-6, rtol=1e-6)


def test_forward_kl_on_texts_is_exact_in_chunks_too(monkeypatch):
    forward_kl_on_texts_is_exact()
    monkeypatch.setattr(distill, "chunk_rows", lambda *_: 2)
    forward_kl_on_texts_is_exact(0.0)


def test_recomputing_changes_nothing():
    torch.testing.assert_close(on_texts(0.0, recompute=True)[0], on_texts(0.0)[0], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("promise", [the_gradient_is_that_of_kl_between_replies, forward_kl_on_texts_is_exact])
@pytest.mark.parametrize("bug", ["teacher one place late", "teacher dropped", "teacher is the student"])
def test_known_bugs(monkeypatch, promise, bug):
    """A teacher read at the wrong places, or whose word counts for nothing."""
    right, log_softmax = distill.hidden_at, distill._log_softmax

    def late(model, tokens, positions, indices, *, recompute=False):
        return right(model, tokens, positions, indices - int(not torch.is_grad_enabled()), recompute=recompute)

    def flat(model, hidden, temperature):
        logprobs = log_softmax(model, hidden, temperature)
        return logprobs if torch.is_grad_enabled() else torch.zeros_like(logprobs)

    def same(model, hidden, temperature, seen=[]):  # noqa: B006
        if torch.is_grad_enabled():
            seen[:] = [log_softmax(model, hidden, temperature)]
            return seen[0]
        return seen[0].detach()

    promise()
    if bug == "teacher one place late":
        monkeypatch.setattr(distill, "hidden_at", late)
    else:
        monkeypatch.setattr(distill, "_log_softmax", flat if bug == "teacher dropped" else same)
    with pytest.raises(AssertionError, match=r"not close|Scalars"):
        promise()


def test_what_lies_behind_a_token_ends_with_its_reply():
    values, reply = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    assert distill.behind(values, reply).tolist() == [5.0, 3.0, 0.0, 20.0, 0.0, 0.0]
    nothing = torch.zeros(0)  # of a rank for which no reply was left
    assert distill.behind(nothing, nothing.long()).tolist() == []
