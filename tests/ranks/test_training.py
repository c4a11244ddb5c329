"""Several processes train as one does: the same rows, the same numbers, and checkpoints that any of them reads."""

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from nanollm.data.batches import Batch
from nanollm.model import int4
from nanollm.model.transformer import Transformer
from nanollm.train import checkpoint
from nanollm.train.checkpoint import Checkpoints, checkpoints, load_newest, save_checkpoint
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.run import check_same_everywhere
from nanollm.train.state import TrainState
from nanollm.train.step import train_step
from nanollm.world import World
from tests.ranks.together import together
from tests.train.conftest import CONFIG

MESHES = {"ddp": (2, 1), "fsdp": (2,)}
MESHES_OF_FOUR = {"hsdp": (2, 2), "fsdp of four": (4,)}  # of four parts some hold none of two experts' stacks
EMBED = "trunk.embed.weight"
OPTIM = OptimConfig(lr=1e-2, warmup_steps=0, balance_rate=0.1, balance_weight=0.01)


def rows(step: int, world: World) -> list[Batch]:
    """Two micro-batches of two rows for each of two ranks, or all four for one; some targets are not trained."""
    tokens = torch.randint(CONFIG.vocab_size, (4, 2, 17), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, :, 1:].where(torch.arange(16) > step, -100)
    return [Batch(tokens[part, :, :-1].contiguous(), targets[part]) for part in range(world.rank, 4, world.size)]


def begin(world: World, dtype: torch.dtype = torch.float32) -> TrainState:
    world = dataclasses.replace(world, dtype=dtype)
    return TrainState.start(Transformer(CONFIG).init(0), OPTIM, world, [EMBED])


def begin_int4(world: World) -> TrainState:
    """The model sees int4 after two steps."""
    c = dataclasses.replace(CONFIG, d_model=64, q_lora_rank=32, v_head_dim=32, d_ff=96, d_expert=32)
    return TrainState.start(Transformer(c).init(0), OPTIM, dataclasses.replace(world, dtype=torch.float32), [EMBED], 2)


def steps(state: TrainState, world: World, count: int, **options: bool) -> list[float]:
    def loss_of(model, batch):
        return next_token_loss(model, batch, OPTIM.balance_weight, **options)

    losses = []
    for _ in range(count):
        stats = train_step(state, rows(state.step, world), loss_of, 1e-2, OPTIM, world)
        losses += [stats.loss, stats.grad_norm, *stats.expert_load[0]]
        state.advance()
    return losses


def with_mesh(world: World, parallel: str) -> World:
    """The same ranks, holding the model in another way."""
    return on_mesh(world, (MESHES | MESHES_OF_FOUR)[parallel])


def on_mesh(world: World, shape: tuple[int, ...]) -> World:
    names = ("copy", "part")[-len(shape) :]
    return dataclasses.replace(world, mesh=init_device_mesh(world.device.type, shape, mesh_dim_names=names))


def train_in_all_ways(world, folder):
    """Of each parallel mode: numbers and weights after 5 steps, a checkpoint and a whole model of the third."""
    found = {}
    for parallel in MESHES:
        own = with_mesh(world, parallel)
        state = begin(own)
        numbers = steps(state, own, 3)
        saved = Checkpoints(folder / parallel, 2, own)
        saved.save(state)
        looked_at = {name: tensor.clone() for name, tensor in state.whole_model().state_dict().items()}
        later = steps(state, own, 2)  # while it is being saved
        saved.wait()
        weights = state.bundle_weights()
        half = begin(own, torch.bfloat16)
        found[parallel] = {
            "numbers": numbers + later,
            "weights": weights,
            "looked_at": looked_at,
            "half": steps(half, own, 3, recompute=True),
            "int4": (steps(few := begin_int4(own), own, 4), few.bundle_weights()),
        }
    return found


def train_by_four(world, folder):
    """Of each mesh of four: numbers of 3 steps, then saved, read again, and those of 2 more, with the weights."""
    found = {}
    for parallel in MESHES_OF_FOUR:
        own = with_mesh(world, parallel)
        state, saved = begin(own), Checkpoints(folder / parallel, 1, own)
        numbers = steps(state, own, 3)
        saved.save(state)
        saved.wait()
        state = begin(own)
        assert load_newest(folder / parallel, state, own)
        found[parallel] = numbers + steps(state, own, 2), state.bundle_weights()
    return found


def go_on(world, folder):
    """From what one process saved, and from what the other mode saved: weights after 2 more steps."""
    found = {}
    for parallel, before in (("ddp", "fsdp"), ("fsdp", "ddp"), ("ddp", "one"), ("fsdp", "one")):
        own = with_mesh(world, parallel)
        state = begin(own)
        assert load_newest(folder / before, state, own)
        steps(state, own, 2)
        found[parallel, before] = state.bundle_weights()
    return found


def close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: its folder with a checkpoint of step 3, numbers and weights after 5 steps, and in bfloat16."""
    folder, state = tmp_path_factory.mktemp("checkpoints"), begin(World())
    numbers = steps(state, World(), 3)
    save_checkpoint(folder / "one", state, keep_last=1)
    looked_at = {name: tensor.clone() for name, tensor in state.whole_model().state_dict().items()}
    numbers += steps(state, World(), 2)
    half = steps(begin(World(dtype=torch.bfloat16)), World(dtype=torch.bfloat16), 3)
    return folder, numbers, state.bundle_weights(), looked_at, half, steps(begin_int4(World()), World(), 4)


@pytest.fixture(scope="module")
def both(alone):
    """What each of two ranks found, and once more."""
    return together(2, train_in_all_ways, alone[0], dtype="float32")


@pytest.mark.long
@pytest.mark.parametrize("parallel", MESHES)
def test_two_processes_train_as_one_does(alone, both, parallel):
    _, numbers, weights, looked_at, half, few_bits = alone
    for of_rank in both:
        found = of_rank[parallel]
        torch.testing.assert_close(torch.tensor(found["numbers"]), torch.tensor(numbers), atol=1e-5, rtol=1e-5)
        close(found["weights"], weights)
        close(found["looked_at"], looked_at)
        torch.testing.assert_close(torch.tensor(found["half"]), torch.tensor(half), atol=0.02, rtol=0.02)
        got, lattice = found["int4"]  # a weight between two numbers of the lattice may go to either
        torch.testing.assert_close(torch.tensor(got), torch.tensor(few_bits), atol=2e-3, rtol=2e-3)
        assert int4.was_trained_for_it(lattice)


@pytest.mark.dist
def test_four_processes_train_as_one_does_and_go_on_from_what_they_saved(alone):
    folder, numbers, weights, *_ = alone
    for of_rank in together(4, train_by_four, folder, dtype="float32"):
        for got_numbers, got_weights in of_rank.values():
            torch.testing.assert_close(torch.tensor(got_numbers), torch.tensor(numbers), atol=1e-5, rtol=1e-5)
            close(got_weights, weights)


@pytest.mark.long
@pytest.mark.parametrize("parallel", MESHES)
def test_all_ranks_hold_the_same_bits(both, parallel):
    first, second = (of_rank[parallel] for of_rank in both)
    assert all(first[name] == second[name] for name in ("numbers", "half"))
    assert first["int4"][0] == second["int4"][0]
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


@pytest.mark.long
def test_any_number_of_processes_in_any_mode_goes_on_from_what_any_other_saved(alone, both):
    folder, _, weights, *_ = alone
    for of_rank in together(2, go_on, folder, dtype="float32"):
        for got in of_rank.values():
            close(got, weights)
    for parallel in MESHES:
        state = begin(World())
        assert load_newest(folder / parallel, state, World()) and state.step == 3
        steps(state, World(), 2)
        close(state.bundle_weights(), weights)


@pytest.mark.long
def test_a_sharded_checkpoint_is_sealed_and_complete(alone, both):
    (path,) = checkpoints(alone[0] / "fsdp")
    names = sorted(file.name for file in path.iterdir())
    assert names[-1] == "state.json" and len(names) == 3  # one file of each rank
    assert all(name.endswith(".safetensors") for name in names[:-1])


@pytest.mark.long
def test_a_checkpoint_that_lacks_a_part_of_a_matrix_is_not_read(alone, both, tmp_path):
    (path,) = checkpoints(alone[0] / "fsdp")
    damaged = Path(shutil.copytree(path, tmp_path / path.name))
    counters, first = checkpoint.verify(damaged), min(damaged.glob("*.safetensors"))
    whole = {name: tuple(tensor.shape) for name, tensor in begin(World()).weights().items()}
    left = {name: tensor for name, tensor in load_file(first).items() if whole.get(name) == tuple(tensor.shape)}
    first.unlink()
    (damaged / "state.json").unlink()
    if left:
        save_file(left, damaged / "left.safetensors")
    checkpoint._sign(damaged, counters)
    with pytest.raises(ValueError, match="lacks a part of"):
        load_newest(tmp_path, begin(World()), World())


def save_where_a_file_is(world, folder):
    """What the save says on this rank."""
    saved = Checkpoints(folder, 1, world)
    saved.save(begin(world))
    with pytest.raises(OSError, match="could not save: Not a directory") as told:
        saved.wait()
    return str(told.value)


@pytest.mark.long
def test_what_one_rank_cannot_save_is_said_by_all(tmp_path):
    (tmp_path / "file").touch()
    said = together(2, save_where_a_file_is, tmp_path / "file" / "checkpoints", dtype="float32")
    assert said[0] == said[1] and "rank 0 could not save" in said[0]


def start_differently(world, folder):
    """What a run says whose processes have other settings."""
    with pytest.raises(ValueError, match=r"optim\.lr is 0\.1 on rank 0 and 0\.2 on rank 1") as told:
        check_same_everywhere({"optim": {"lr": 0.1 * (1 + world.rank)}}, {}, world)
    return str(told.value)


@pytest.mark.long
def test_processes_that_were_started_differently_are_refused(tmp_path):
    (said, also) = together(2, start_differently, tmp_path, dtype="float32")
    assert said == also and "start every host with the same command" in said


def save_slowly(world, folder):
    """Ask for a checkpoint and wait: as if the main rank took long over the others' files."""
    if world.is_main:
        signing = checkpoint._sign
        checkpoint._sign = lambda *arguments: (time.sleep(2), signing(*arguments))
    saved = Checkpoints(folder, 1, world)
    saved.save(begin(world))
    saved.wait()
    return len(checkpoints(folder))


@pytest.mark.dist
def test_no_rank_goes_on_before_a_checkpoint_that_was_waited_for_is_there(tmp_path):
    assert together(2, save_slowly, tmp_path, dtype="float32") == [1, 1]
