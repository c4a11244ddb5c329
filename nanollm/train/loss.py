"""How wrong is the model about the next token?

A loss is a pair (sum, count): it is divided once, by the count over all micro-batches and ranks.
Letters: B rows, T tokens, D model width, V vocabulary, N = B*T.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.transformer import Transformer

MAX_LOGITS = 2**26
"""Float32 logits held at once, as a number of elements (256 MiB)."""


def cross_entropy_sum(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-probabilities of the targets, in nats; float32, shape ().

    hidden (B, T, D); targets (B, T), IGNORE where nothing is learned. The logits (N, V) are never held at once when
    they are many: each chunk's are made, used, dropped, and made again for the backward pass.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    vocab_size = head.out_features
    rows = max(1, MAX_LOGITS // vocab_size)
    if len(flat_hidden) <= rows:
        return _chunk_loss(head, flat_hidden, flat_targets)
    chunks = zip(flat_hidden.split(rows), flat_targets.split(rows), strict=True)
    sums = [checkpoint(_chunk_loss, head, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum()


def _chunk_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORE, reduction="sum")


def token_logprobs(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from (without gradient).

    hidden (M, D); targets (M,); both results (M,) float32. Logits are divided by the temperature, and made in chunks.
    """
    rows = max(1, MAX_LOGITS // head.out_features)
    if len(hidden) <= rows:
        return _chunk_logprobs(head, hidden, targets, temperature)
    parts = [
        checkpoint(_chunk_logprobs, head, *chunk, temperature, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logprobs = (logits if logits.dtype == torch.float64 else logits.float()).div(temperature).log_softmax(-1)  # (M, V)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def next_token_loss(model: Transformer, batch: Batch, balance_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch to train on, and the part of it that is cross-entropy, both sums in nats.

    `balance_weight` adds the sequence-wise balance loss of every Mixture of Experts, weighted by the trained tokens
    of its sequence so that dividing by the tokens of all micro-batches gives the mean over sequences.
    """
    for layer in model.moe_layers():
        layer.wants_balance_losses = balance_weight > 0
    hidden = model.trunk(batch.tokens, positions=batch.positions)
    cross_entropy = cross_entropy_sum(model.head, hidden, batch.targets)
    loss = cross_entropy
    if balance_weight:
        trained = (batch.targets != IGNORE).sum(1)  # (B,)
        for layer in model.moe_layers():
            assert layer.balance_losses is not None
            loss = loss + balance_weight * (layer.balance_losses * trained).sum()
            layer.wants_balance_losses, layer.balance_losses = False, None
    return loss, cross_entropy.detach()
