"""How many bits does the model need per byte of text it has not seen?

Bits per byte compares models with different tokenizers, which loss per token does not. Tokens that stand for no text
(<s>, </s>) carry no bytes and are left out of both sums.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nanollm.data.batches import IGNORE, Batch
from nanollm.model.transformer import Transformer
from nanollm.train.loss import cross_entropy_sum
from nanollm.world import World


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
    sizes = torch.from_numpy(token_bytes).long()
    nats, n_bytes, tokens = 0.0, 0, 0
    with model.evaluating():
        for batch in world.own(batches):
            target_bytes = torch.where(batch.targets == IGNORE, 0, sizes[batch.targets.clamp(min=0)])
            targets = batch.targets.where(target_bytes > 0, IGNORE)
            positions = None if batch.positions is None else batch.positions.to(device)
            hidden = model.trunk(batch.tokens.to(device), positions=positions)
            nats += cross_entropy_sum(model.head, hidden, targets.to(device)).item()
            n_bytes += int(target_bytes.sum())
            tokens += int((targets != IGNORE).sum())
    nats, n_bytes, tokens = world.total(nats), int(world.total(n_bytes)), int(world.total(tokens))
    if n_bytes == 0:
        raise ValueError("there is no text to measure: every target is a mark without bytes")
    return BitsPerByte(nats, n_bytes, tokens)
