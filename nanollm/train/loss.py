"""Next-token cross-entropy and token log-probabilities, in chunks, without ever holding all logits.

A loss is a sum over tokens; train/step.py divides it once, by the count of all micro-batches and ranks.
The logits of all tokens never exist. Those of a chunk of rows are made and become the gradients of hidden and head at
once, so the head is multiplied three times; four times where the backward pass has to make the logits again.
Letters: B rows, T tokens, D model width, V vocabulary, N = B*T, M tokens of replies, R rows of a chunk.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.moe import balance_loss
from nanollm.model.transformer import Transformer, is_empty

MAX_LOGITS = 2**26  # logits held at once, as a number of elements of the compute type (128 MiB in bfloat16)
MAX_LOGITS_CUDA = 2**28  # the same on a GPU, whose many processors want larger products (512 MiB in bfloat16)
IN_CACHE = 2**19
"""Float32 logits held at once on a CPU, as a number of elements, so that they stay in its cache."""
ROWS = 64
"""On a CPU rows are padded to a multiple of this, so that few shapes occur: oneDNN makes a kernel for each."""


def cross_entropy_sum(head: nn.Linear, hidden: Tensor, targets: Tensor, fuses: bool = False) -> Tensor:
    """Sum of the negative log-probabilities of the targets, in nats; float32 (float64 of float64), shape ().

    hidden (B, T, D); targets (B, T), IGNORE where nothing is learned. `fuses`: while training, turn logits into errors
    in kernels made by torch.compile.
    """
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    if hidden.device.type == "cpu":  # elsewhere the host would have to wait for the number of trained tokens
        trained = (wanted != IGNORE).nonzero()[:, 0]
        if len(trained) < len(wanted):
            rows, wanted = _padded(rows.index_select(0, trained), wanted.index_select(0, trained))
    total: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        *_differentiated(rows, head.weight), wanted, fuses
    )
    return total


def token_logprobs(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from (without gradient).

    hidden (M, D); targets (M,); both results (M,) float32 (float64 of float64). Logits are divided by the temperature.
    """
    count = len(targets)
    if hidden.device.type == "cpu":
        hidden, targets = _padded(hidden, targets)
    targets = targets.clamp(min=0)  # padded rows want any token
    both = _differentiated(hidden, head.weight)
    logprobs, entropies = _TokenLogprobs.apply(*both, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs[:count, 0], entropies[:count, 0]


def _differentiated(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same, but a Function is told of a gradient only where one is recorded."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


def _padded(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    missing = -len(targets) % ROWS
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=IGNORE)


class _CrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass over the chunks, its gradients: the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, fuses: bool) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) to ()."""
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        fuses = fuses and gradients.are_wanted  # full chunks and a last one: no more shapes than that
        to_grad = (
            torch.compile(_logits_to_grad_fused, dynamic=False)
            if fuses
            else partial(_logits_to_grad, are_wanted=gradients.are_wanted)
        )
        for rows, logits in _chunks(hidden, weight):
            trained, wanted = (targets[rows] != IGNORE)[:, None], targets[rows].clamp(min=0)[:, None]  # (R, 1)
            for part in [slice(None)] if fuses else _parts(logits):
                logprobs = to_grad(logits[part], wanted[part])
                total -= logprobs.masked_fill_(~trained[part], 0.0).sum()
            gradients.add(rows, logits, trained)
        # Sums over all tokens leave float16; they fit into it once they are divided by their number.
        ctx.save_for_backward(*gradients.finished(is_wide=hidden.dtype == torch.float16))
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_weight = (each if each is None else (each * scale).to(ctx.dtype) for each in ctx.saved_tensors)
        return of_hidden, of_weight, None, None


class _TokenLogprobs(torch.autograd.Function):
    """Every token's gradient comes from outside, so those of hidden and head are made in the backward pass.

    The errors are kept until then where one chunk holds them all, and made again where it does not.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden (M, D), weight (V, D), targets (M,) to log-probabilities and entropies (M,)."""
        logprobs = torch.empty(len(targets), 1, dtype=_wide(hidden), device=hidden.device)
        entropies = torch.empty_like(logprobs)
        errors = None
        for rows, logits in _chunks(hidden, weight):
            wanted = targets[rows, None]
            keeps = any(ctx.needs_input_grad) and len(logits) == len(targets)
            for part in _parts(logits):
                exp_logits = logits[part].to(logprobs.dtype).div_(temperature)
                logprobs[rows][part], sums = _exponentiate(exp_logits, wanted[part], entropies[rows][part])
                if keeps:
                    _nll_grad(exp_logits, sums, wanted[part], out=logits[part])
            if keeps:
                errors = logits
        ctx.save_for_backward(hidden, weight, targets, errors)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, errors = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        scale = incoming / -ctx.temperature  # (M, 1): the errors are those of the negative log-probability
        if errors is not None:
            gradients.add(slice(0, len(targets)), errors, scale)
            return *gradients.finished(), None, None
        for rows, logits in _chunks(hidden, weight):
            for part in _parts(logits):
                wanted = targets[rows][part, None]
                exp_logits = logits[part].to(incoming.dtype).div_(ctx.temperature)
                _, sums = _exponentiate(exp_logits, wanted)
                _nll_grad(exp_logits, sums, wanted, out=logits[part])
            gradients.add(rows, logits, scale[rows])
        return *gradients.finished(), None, None


class _Gradients:
    """Of hidden (N, D) and of the head (V, D), chunk by chunk; None where nobody asks."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        self.hidden, self.weight = hidden, weight
        self.of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self.of_weight = torch.zeros_like(weight) if wanted[1] else None
        # Several chunks are added up in float32: sums that are rounded each time would drift with their number.
        # float16 has no room for sums over many rows at all.
        is_half = weight.dtype == torch.float16
        several = is_half or (
            len(hidden) > chunk_rows(len(weight), hidden.device.type) and weight.dtype != _wide(hidden)
        )
        self.rows_that_fit = 1024 if is_half else 2**62
        self.sum = torch.zeros_like(weight, dtype=_wide(hidden)) if wanted[1] and several else None

    @property
    def are_wanted(self) -> bool:
        return self.of_hidden is not None or self.of_weight is not None

    def add(self, rows: slice, errors: Tensor, scale: Tensor) -> None:
        """errors (R, V) are those of these rows of hidden; each counts scale (R, 1) times."""
        if self.of_hidden is not None:
            torch.mm(errors, self.weight, out=self.of_hidden[rows]).mul_(scale)
        if self.of_weight is not None:
            scaled = (self.hidden[rows] * scale).to(errors.dtype)
            if self.sum is None:
                self.of_weight.addmm_(errors.T, scaled)
            else:
                shrink = max(1.0, len(errors) / self.rows_that_fit)
                scaled = scaled if shrink == 1 else scaled / shrink
                self.sum.add_(torch.mm(errors.T, scaled, out=self.of_weight), alpha=shrink)

    def finished(self, *, is_wide: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """is_wide: that of the head in float32, where it was added up so."""
        if is_wide and self.sum is not None:
            return self.of_hidden, self.sum
        if self.sum is not None and self.of_weight is not None:
            self.of_weight.copy_(self.sum)
            self.sum = None
        return self.of_hidden, self.of_weight


def _logits_to_grad(logits: Tensor, targets: Tensor, are_wanted: bool) -> Tensor:
    """Log-probabilities (r, 1) of the targets (r, 1); the logits (r, V) become errors in place, if they are wanted."""
    exp_logits = logits.to(_wide(logits))
    logprobs, sums = _exponentiate(exp_logits, targets)
    if are_wanted:
        _nll_grad(exp_logits, sums, targets, out=logits)
    return logprobs


def _logits_to_grad_fused(logits: Tensor, targets: Tensor) -> Tensor:
    """`_logits_to_grad` for a compiler: fused, these operations never write a float32 copy of the logits."""
    wide = logits.to(_wide(logits))
    of_all = wide.logsumexp(-1, keepdim=True)
    logprobs = wide.gather(-1, targets) - of_all
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets
    logits.copy_((wide - of_all).exp() - is_target.to(wide.dtype))
    return logprobs


def _exponentiate(logits: Tensor, targets: Tensor, entropies: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn logits (r, V) into the exponentials of their distances to the greatest, in place.

    Returns the log-probabilities of the targets and the sums of the exponentials, (r, 1) each as the targets.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    of_targets = logits.gather(-1, targets)
    exp_logits = logits.exp_() if entropies is None else logits.exp()
    sums = exp_logits.sum(-1, keepdim=True)
    if entropies is not None:
        entropies.copy_(sums.log() - (exp_logits[:, None] @ logits[:, :, None])[:, 0] / sums)
        logits.copy_(exp_logits)
    return of_targets - sums.log(), sums


def _nll_grad(exp_logits: Tensor, sums: Tensor, targets: Tensor, out: Tensor) -> None:
    """Gradient of the negative log-probability of the targets by the logits (r, V); spoils exp_logits."""
    torch.div(exp_logits.scatter_add_(-1, targets, -sums), sums, out=out)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits (R, V) of some rows after the other; each chunk overwrites the one before."""
    rows = min(len(hidden), chunk_rows(len(weight), hidden.device.type))
    logits = hidden.new_empty(rows, len(weight))
    for begin in range(0, len(hidden), rows or 1):
        chunk = hidden[begin : begin + rows]
        yield slice(begin, begin + rows), torch.mm(chunk, weight.T, out=logits[: len(chunk)])


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows whose logits are there at once."""
    most = MAX_LOGITS_CUDA if device_type == "cuda" else MAX_LOGITS
    return max(ROWS, most // vocab_size // ROWS * ROWS)


def _parts(logits: Tensor) -> list[slice]:
    """Rows that are turned from logits into errors at once."""
    most = IN_CACHE if logits.device.type == "cpu" else MAX_LOGITS
    rows = max(1, most // logits.shape[1])
    return [slice(begin, begin + rows) for begin in range(0, len(logits), rows)]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def next_token_loss(
    model: Transformer,
    batch: Batch,
    balance_weight: float = 0.0,
    *,
    recompute: bool = False,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch to train on, and the part of it that is cross-entropy, both sums in nats.

    `balance_weight` adds the sequence-wise balance loss of every Mixture of Experts, weighted by the trained tokens
    of its sequence so that dividing by the tokens of all micro-batches gives the mean over sequences. recompute: as in
    Trunk.routed; is_compiled: the blocks are, so that on GPUs the loss shall be, too.
    """
    hidden, routings = model.trunk.routed(batch.tokens, positions=batch.positions, recompute=recompute)
    # On CPUs logits become errors in the cache already.
    cross_entropy = cross_entropy_sum(model.head, hidden, batch.targets, is_compiled and hidden.is_cuda)
    loss = cross_entropy
    if balance_weight:
        trained = (batch.targets != IGNORE).sum(1)  # (B,)
        is_text = None if batch.positions is None else ~is_empty(batch.positions)
        for routing in routings:
            loss = loss + balance_weight * (balance_loss(routing.scores, routing.experts, is_text) * trained).sum()
    return loss, cross_entropy.detach()
