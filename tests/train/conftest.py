"""A model of a few thousand parameters and batches of whole-number noise."""

import dataclasses

import pytest
import torch

from nanollm.data.batches import Batch
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.world import World
from tests.model.conftest import TINY, rng

__all__ = ["rng"]

CONFIG = dataclasses.replace(TINY, vocab_size=61, context_length=32)


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def start():
    """A fresh state, the same each time: start(dtype=..., **optim)."""

    def make(dtype: torch.dtype = torch.float32, **optim) -> TrainState:
        return TrainState.start(Transformer(CONFIG).init(0), OptimConfig(**optim), World(dtype=dtype))

    return make


@pytest.fixture
def batch_at():
    """The batch of a step, always the same: batch_at(step, rows=4)."""

    def make(step: int, rows: int = 4, length: int = 16) -> Batch:
        tokens = torch.randint(61, (rows, length + 1), generator=torch.Generator().manual_seed(step))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    return make
