"""One optimizer step.

Micro-batches, one denominator, backward, clipping, the update, the routers' balance. A loss or gradient that is not
finite never reaches the weights, nor does that of a loss far above those before. All ranks decide alike, by numbers
that are sums over all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from nanollm.model.transformer import Transformer
from nanollm.train.compile import fastest_attention
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.world import World

SIGMAS = 6.0  # as a rule
WINDOW = 128  # steps that a loss is compared with
MIN_LOSSES = 64  # steps before which nothing is an outlier


def spike_threshold(losses: Sequence[float], sigmas: float) -> float:
    """The largest loss that is not an outlier after these; infinite while they are too few, or with 0 sigmas.

    Source: the skip-step optimizer of OLMo-core (github.com/allenai/OLMo-core, 6 standard deviations over 128 steps).
    There an outlier enters the window as it is, so that after a few of them the next one passes; here it enters as the
    largest loss that would have passed: what stays a little higher is soon normal again, what is a hundred times higher
    never is.
    """
    if not sigmas or len(losses) < MIN_LOSSES:
        return float("inf")
    return fmean(losses) + sigmas * pstdev(losses)


def update_window(losses: Sequence[float], loss: float, highest: float) -> list[float]:
    """The window after one more finite loss."""
    return [*losses, min(loss, highest)][-WINDOW:]


class MicroBatch(Protocol):
    """A part of what one optimizer step sees."""

    @property
    def count(self) -> float:
        """The step's loss is the sum of all micro-batches' losses, divided once, by the sum of their counts."""

    def to(self, device: torch.device) -> Self:
        """The same micro-batch on a device."""


AnyBatch = TypeVar("AnyBatch", bound=MicroBatch)

LossFunction = Callable[[Transformer, AnyBatch], tuple[Tensor, Tensor]]
"""Model and micro-batch to (loss to train on, loss to report), both sums; of trained tokens, for a Batch."""

SCALE_GROWS_AFTER = 1000  # steps without overflow after which float16's loss scale doubles


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step saw."""

    loss: float
    """Sum over all micro-batches and ranks, divided by their count; for a Batch: nats per trained token."""
    grad_norm: float  # global norm before clipping
    lr: float
    count: float  # what the loss was divided by; for a Batch: trained tokens
    expert_load: list[list[float]]
    """Per Mixture of Experts: each expert's share of the tokens; the shares sum to 1."""
    skipped: bool
    """The loss or a gradient was not finite, or the loss an outlier, and the weights stayed as they were."""

    @property
    def tokens(self) -> int:
        """Trained tokens, where the step saw Batches."""
        return int(self.count)

    def values(self) -> dict[str, object]:
        """Names and values for the log."""
        values: dict[str, object] = {"loss": self.loss, "grad_norm": self.grad_norm, "lr": self.lr}
        if self.expert_load:
            # Router health: 1 where every expert of every layer gets its share; n_experts where one gets everything.
            values["load_max_over_mean"] = max(max(shares) * len(shares) for shares in self.expert_load)
            values["load_min_over_mean"] = min(min(shares) * len(shares) for shares in self.expert_load)
            values["expert_load"] = self.expert_load
        return values | ({"skipped": True} if self.skipped else {})


def train_step(
    state: TrainState,
    micro_batches: Sequence[AnyBatch],
    loss_of: LossFunction[AnyBatch],
    lr: float,
    c: OptimConfig,
    world: World,
) -> StepStats:
    """Move the weights once, by the gradient of the mean loss over the micro-batches of all ranks."""
    device = next(state.model.parameters()).device
    count = world.all_reduce_sum(sum(batch.count for batch in micro_batches))
    reports = []
    with fastest_attention(device):
        for number, batch in enumerate(micro_batches, start=1):
            state.set_grad_sync(number == len(micro_batches))
            loss, report = state.run(loss_of, batch.to(device))
            # One denominator for all micro-batches and ranks: one with few trained tokens must not shout louder.
            (loss * (state.loss_scale / count)).backward()
            reports.append(report)

    grads = state.gradients()
    report_sum, loads = torch.stack(reports).sum(), [layer.load for layer in state.model.moe_layers()]
    world.all_reduce_([report_sum, *loads])
    norm = world.global_norm(torch.stack(torch._foreach_norm(grads)).norm())
    # Everything that the host wants to know at once: one wait for the device, not one for each number.
    numbers = torch.cat([part.flatten().float() for part in (report_sum, norm, *loads)]).cpu()
    (reported_sum, grad_norm), *tokens_of_experts = (part.tolist() for part in numbers.split([2, *map(len, loads)]))
    reported = reported_sum / count
    finite = math.isfinite(reported) and math.isfinite(grad_norm)
    highest = spike_threshold(state.losses, c.spike_sigmas)
    moves = finite and reported <= highest
    if finite:
        state.losses = update_window(state.losses, reported, highest)
    if moves:
        if c.max_grad_norm and grad_norm > c.max_grad_norm:
            torch._foreach_mul_(grads, c.max_grad_norm / grad_norm)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        state.copy_to_model()
    state.zero_grad()
    _adjust_loss_scale(state, finite)
    for layer in state.model.moe_layers():
        layer.balance(c.balance_rate if moves and not state.has_adapter else 0.0)
    return StepStats(
        loss=reported,
        grad_norm=grad_norm,
        lr=lr,
        count=count,
        expert_load=[_shares(tokens) for tokens in tokens_of_experts],
        skipped=not moves,
    )


def _shares(tokens: Sequence[float]) -> list[float]:
    """Of all tokens, those of each expert."""
    total = max(1.0, sum(tokens))
    return [own / total for own in tokens]


def _adjust_loss_scale(state: TrainState, finite: bool) -> None:
    """float16 only: halve the loss scale after an overflow, double it after a long time without one."""
    if not state.scales_loss:
        return
    state.scale_age = state.scale_age + 1 if finite else 0
    if not finite:
        state.loss_scale /= 2
    elif state.scale_age == SCALE_GROWS_AFTER:
        state.loss_scale, state.scale_age = state.loss_scale * 2, 0
