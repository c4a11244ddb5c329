"""What happens in one optimizer step?

Micro-batches, one denominator, backward, clipping, the update, the routers' balance. A loss or gradient that is not
finite never reaches the weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanollm.data.batches import Batch
from nanollm.model.transformer import Transformer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState

LossFunction = Callable[[Transformer, Batch], tuple[Tensor, Tensor]]
"""Model and micro-batch to (loss to train on, loss to report), both sums over the micro-batch's trained tokens."""

SCALE_GROWS_AFTER = 1000
"""Steps without overflow after which float16's loss scale doubles."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step saw."""

    loss: float
    """Mean over the trained tokens of all micro-batches, in nats."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    tokens: int
    """Trained tokens."""
    expert_load: list[list[float]]
    """Per Mixture of Experts: each expert's share of the tokens; the shares sum to 1."""
    skipped: bool
    """The loss or a gradient was not finite and the weights stayed as they were."""


def train_step(
    state: TrainState, micro_batches: Sequence[Batch], loss_of: LossFunction, lr: float, c: OptimConfig
) -> StepStats:
    """Move the weights once, by the mean gradient over the trained tokens of all micro-batches."""
    tokens = sum(batch.count for batch in micro_batches)
    device = next(state.model.parameters()).device
    reports = []
    for batch in micro_batches:
        loss, report = loss_of(state.model, batch.to(device))
        # One denominator for all micro-batches: one with few trained tokens must not shout louder.
        (loss * (state.loss_scale / tokens)).backward()
        state.collect_gradients()
        reports.append(report)

    reported = torch.stack(reports).sum().item() / tokens
    grads = [master.grad for master in state.masters.values() if master.grad is not None]
    norms = torch._foreach_norm(grads)
    grad_norm = torch.stack(norms).norm().item()
    finite = math.isfinite(reported) and math.isfinite(grad_norm)
    if finite:
        if c.max_grad_norm and grad_norm > c.max_grad_norm:
            torch._foreach_mul_(grads, c.max_grad_norm / grad_norm)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        state.publish()
    state.drop_gradients()
    _adjust_loss_scale(state, finite)
    return StepStats(
        loss=reported,
        grad_norm=grad_norm,
        lr=lr,
        tokens=tokens,
        expert_load=_balance(state.model, c.balance_rate if finite else 0.0),
        skipped=not finite,
    )


def _balance(model: Transformer, rate: float) -> list[list[float]]:
    """Nudge every router's bias and return the shares it was nudged by."""
    shares = []
    for layer in model.moe_layers():
        shares.append((layer.load / layer.load.sum().clamp(min=1)).tolist())
        layer.balance(rate)
    return shares


def _adjust_loss_scale(state: TrainState, finite: bool) -> None:
    """float16 only: halve the loss scale after an overflow, double it after a long time without one."""
    if not state.scales_loss:
        return
    state.scale_age = state.scale_age + 1 if finite else 0
    if not finite:
        state.loss_scale /= 2
    elif state.scale_age == SCALE_GROWS_AFTER:
        state.loss_scale, state.scale_age = state.loss_scale * 2, 0
