"""Measures bits per byte of held-out text, as a whole and document by document.

Bits per byte compares models with different tokenizers, which loss per token does not. Tokens that stand for no text
(<s>, </s>) carry no bytes and are left out of both sums.
Letters: B rows, T tokens, N documents, M targets that stand for text.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanollm.data.batches import IGNORE, Batch
from nanollm.evals.stats import Ratio, ratio
from nanollm.model.transformer import Transformer
from nanollm.train.loss import cross_entropy_sum, token_logprobs
from nanollm.world import World

NO_TEXT = "there is no text to measure: every target is a mark without bytes"


@dataclass(frozen=True)
class BitsPerByte:
    """Total negative log-probability of a text and its size."""

    nats: float
    bytes: int
    tokens: int

    @property
    def value(self) -> float:
        return self.nats / (self.bytes * math.log(2))


@torch.inference_mode()
def bits_per_byte(
    model: Transformer, batches: Iterable[Batch], token_bytes: npt.NDArray[np.int32], world: World | None = None
) -> BitsPerByte:
    """Read the batches' targets with the model; token_bytes (V,) says how many bytes each id stands for.

    The ranks of a world share the batches, and all get the same answer.
    """
    world = world or World()
    device = model.head.weight.device
    nats, n_bytes, tokens = 0.0, 0, 0
    with model.evaluating():
        for batch in world.shard(batches):
            target_bytes = bytes_of(batch.targets, token_bytes)
            targets = batch.targets.where(target_bytes > 0, IGNORE)
            there = batch.to(device)
            hidden = model.trunk(there.tokens, positions=there.positions)
            nats += cross_entropy_sum(model.head, hidden, targets.to(device)).item()
            n_bytes += int(target_bytes.sum())
            tokens += int((targets != IGNORE).sum())
    of_all = [world.all_reduce_sum(number) for number in (nats, n_bytes, tokens)]
    if of_all[1] == 0:
        raise ValueError(NO_TEXT)
    return BitsPerByte(of_all[0], int(of_all[1]), int(of_all[2]))


def bytes_of(targets: torch.Tensor, token_bytes: npt.NDArray[np.int32]) -> torch.Tensor:
    """How many bytes of text each target stands for, (B, T) int64: none where nothing is predicted."""
    sizes = torch.from_numpy(token_bytes).long()
    return torch.where(targets == IGNORE, 0, sizes[targets.clamp(min=0)])


# --- document by document ---


@dataclass(frozen=True)
class Documents:
    """The same of each document, in their order; those without text are left out."""

    nats: npt.NDArray[np.float64]  # (N,)
    bytes: npt.NDArray[np.float64]  # (N,), whole numbers
    tokens: int

    @property
    def total(self) -> BitsPerByte:
        return BitsPerByte(float(self.nats.sum()), int(self.bytes.sum()), self.tokens)

    @property
    def ratio(self) -> Ratio:
        """Bits per byte, and how sure that is with documents like these."""
        return ratio((self.nats / math.log(2)).tolist(), self.bytes.tolist())

    def minus(self, other: "Documents") -> Ratio:
        """Bits per byte of this model less those of another one, on the same documents."""
        bits = (self.nats - other.nats) / math.log(2)
        return ratio(bits.tolist(), self.bytes.tolist())


Numbered = Iterable[tuple[Batch, torch.Tensor]]
"""Batches, and of which document each place is, from 0: (B, T) or (B, 1) int64."""


@torch.inference_mode()
def by_document(model: Transformer, batches: Numbered, token_bytes: npt.NDArray[np.int32]) -> Documents:
    """Read the batches' targets with the model, and add up by document. ValueError if there is no text at all."""
    device = model.head.weight.device
    sums: list[npt.NDArray[np.float64]] = []  # of each batch (3, documents in it): number, nats, bytes
    tokens = 0
    with model.evaluating():
        for batch, numbers in batches:
            target_bytes = bytes_of(batch.targets, token_bytes)
            is_text = target_bytes > 0
            there = batch.to(device)
            hidden = model.trunk(there.tokens, positions=there.positions)
            wanted = batch.targets[is_text].to(device)  # (M,)
            logprobs, _ = token_logprobs(model.head, hidden[is_text.to(device)], wanted, temperature=1.0)
            found, place = np.unique(numbers.expand_as(is_text)[is_text].numpy(), return_inverse=True)
            of_each = (added(place, each.cpu().numpy()) for each in (-logprobs.double(), target_bytes[is_text]))
            sums.append(np.stack([found.astype(np.float64), *of_each]))
            tokens += len(wanted)
    if not tokens:
        raise ValueError(NO_TEXT)
    numbers_of_all, nats, n_bytes = np.concatenate(sums, axis=1)
    _, place = np.unique(numbers_of_all, return_inverse=True)
    return Documents(added(place, nats), added(place, n_bytes), tokens)


def added(place: npt.NDArray[np.intp], values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The sum of the values at each place."""
    return np.bincount(place, values).astype(np.float64)
