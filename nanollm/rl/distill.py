"""Distillation: a student's next-token distributions move to a teacher's, on given texts or on its own replies.

Sources: on given texts, forward KL (Hinton et al., arXiv:1503.02531); on the student's own replies, reverse KL, in
which the teacher judges every token (GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543).
Letters: B rows, T tokens, D model width, V vocabulary, M scored tokens, R replies.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.transformer import Transformer
from nanollm.rl.loss import RolloutBatch, hidden_at
from nanollm.train.loss import chunk_rows

FLOAT_COPIES = 8  # of a chunk's logits that exist at once, in float32, where the plain loss has one

DirectionName = Literal["forward", "reverse"]
CreditName = Literal["token", "reply"]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch is scored: `tokens` (B, T) with `positions`, at `indices` (M,) of the flattened rows."""

    tokens: Tensor
    positions: Tensor | None
    indices: Tensor
    targets: Tensor  # (M,): the ids that follow


def divergences(
    student: Transformer,
    teacher: Transformer,
    place: Place,
    temperature: float,
    direction: DirectionName,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL between both models' next-token distributions, and the student's log-probabilities of the targets: (M,) each.

    forward: KL(teacher, student); reverse: KL(student, teacher). Both models' logits are divided by the temperature.
    They exist for a chunk of tokens at a time, and are made again for the gradient; the head's gradients of the chunks
    are added up in the compute type.
    """
    where = place.tokens, place.positions, place.indices
    of_student = hidden_at(student, *where, recompute=recompute)
    with torch.no_grad():
        of_teacher = hidden_at(teacher, *where)

    def of_chunk(own: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ours = _log_softmax(student, own, temperature)
        with torch.no_grad():
            theirs = _log_softmax(teacher, other, temperature)
        kl = theirs.exp() * (theirs - ours) if direction == "forward" else ours.exp() * (ours - theirs)
        return kl.sum(-1), ours.gather(-1, targets[:, None])[:, 0]

    rows = max(1, chunk_rows(student.config.vocab_size, place.tokens.device.type) // FLOAT_COPIES)
    parts = [
        checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(each.split(rows) for each in (of_student, of_teacher, place.targets)), strict=True)
    ]
    kl, logprobs = (torch.cat(each) for each in zip(*parts, strict=True))
    return kl, logprobs


def _log_softmax(model: Transformer, hidden: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (M, V), float32 or wider."""
    logits = model.head(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(-1)


def logits_loss(
    student: Transformer,
    batch: Batch,
    *,
    teacher: Transformer,
    temperature: float,
    ce_weight: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over trained tokens of forward KL, mixed with the plain loss by `ce_weight`; and the same detached.

    The plain loss is the student's negative log-probability of the target, at the same temperature.
    """
    targets = batch.targets.flatten()
    indices = (targets != IGNORE).nonzero()[:, 0]
    place = Place(batch.tokens, batch.positions, indices, targets[indices])
    kl, logprobs = divergences(student, teacher, place, temperature, "forward", recompute=recompute)
    loss = ((1 - ce_weight) * kl - ce_weight * logprobs).sum()
    return loss, loss.detach()


def on_policy_loss(
    student: Transformer,
    batch: RolloutBatch,
    *,
    teacher: Transformer,
    temperature: float,
    credit: CreditName = "token",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over the student's own tokens of reverse KL, whose gradient is to be followed; and its value.

    token: each token answers for the divergence where it was drawn. reply: also for that behind it, so that the
    expected gradient is that of KL(student, teacher) between whole replies (MiniLLM), with more variance.
    """
    place = Place(batch.tokens, batch.positions, batch.token_indices, batch.targets)
    kl, logprobs = divergences(student, teacher, place, temperature, "reverse", recompute=recompute)
    terms = kl
    if credit == "reply":
        terms = kl + behind(kl.detach(), batch.reply) * logprobs
    return (batch.weights * terms).sum(), (batch.weights * kl).sum().detach()


def behind(values: Tensor, reply: Tensor) -> Tensor:
    """The sum of the values (M,) of all later tokens of the same reply (M,), whose tokens stand together."""
    sums = values.flip(0).cumsum(0).flip(0) - values  # all later ones, of later replies too
    totals = values.new_zeros(len(reply.bincount())).index_add(0, reply, values)  # (R,)
    later = totals.flip(0).cumsum(0).flip(0) - totals  # what the replies behind this one have
    return sums - later[reply]
