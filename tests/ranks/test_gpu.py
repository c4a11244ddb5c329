"""Sharded training on a GPU, by NCCL: one rank is enough to take every path but the wires."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from nanollm.config import load_preset
from nanollm.data.batches import Batch
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.train.checkpoint import Checkpoints, load_newest
from nanollm.train.compile import SpeedConfig, compile_blocks
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.ranks.test_training import EMBED, on_mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # of torch's own compiler
]

CUDA = torch.device("cuda", 0)
SHAPE = ModelConfig(**load_preset("model", "nano-1m"))
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0)
ONE_RANK = {"ddp": (1, 1), "fsdp": (1,)}
ALONE = World(device=CUDA, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[World]:
    store = distributed.HashStore()
    distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    yield dataclasses.replace(ALONE, saving=distributed.new_group(backend="gloo"))
    distributed.destroy_process_group()


def begin(world: World, compile: str = "off") -> TrainState:
    state = TrainState.start(Transformer(SHAPE).init(0).to(CUDA), OPTIM, world, [EMBED])
    compile_blocks(state.model, SpeedConfig(compile=compile), CUDA)
    return state


def steps(state: TrainState, world: World, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        generator = torch.Generator().manual_seed(state.step)
        tokens = torch.randint(SHAPE.vocab_size, (2, 4, 257), generator=generator)
        batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]
        losses.append(train_step(state, batches, next_token_loss, 1e-2, OPTIM, world).loss)
        state.step += 1
    return losses


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_sharded_model_trains_as_a_whole_one(one_rank, parallel, compile):
    alone, world = begin(ALONE), on_mesh(one_rank, ONE_RANK[parallel])
    expected, state = steps(alone, ALONE, 8), begin(world, compile)
    torch.testing.assert_close(torch.tensor(steps(state, world, 8)), torch.tensor(expected), atol=0.02, rtol=0)
    seen = state.whole_model()
    for name, parameter in alone.whole_model().named_parameters():
        assert (seen.get_parameter(name) - parameter).abs().mean() < 0.02


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_saved_beside_training_is_the_state_of_its_moment(one_rank, parallel, tmp_path):
    world = on_mesh(one_rank, ONE_RANK[parallel])
    state = begin(world)
    steps(state, world, 3)
    before = {name: tensor.clone() for name, tensor in state.bundle_weights().items()}
    saved = Checkpoints(tmp_path, 1, world)
    saved.save(state)
    expected = steps(state, world, 3)
    saved.wait()
    later = begin(world)
    assert load_newest(tmp_path, later, world) and later.step == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in later.bundle_weights().items())
    assert steps(later, world, 3) == pytest.approx(expected, abs=1e-3)
