"""What is not finite, or far above what came before, moves no weight on any rank; a run of it names its batches."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanollm.cli import main
from nanollm.data.batches import TextShards, Windows
from nanollm.data.order import Mixture
from nanollm.data.shards import Shards
from nanollm.stages import pretrain, sft
from nanollm.train.checkpoint import Checkpoints, checkpoints, load_newest, save_checkpoint
from nanollm.train.dtensor import to_local
from nanollm.train.loss import next_token_loss
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.run import MAX_SKIPPED_IN_A_ROW
from nanollm.train.state import TrainState
from nanollm.train.step import MIN_LOSSES, SIGMAS, WINDOW, spike_threshold, train_step, update_window
from nanollm.world import World
from tests.ranks.test_training import begin, rows, with_mesh
from tests.ranks.together import together
from tests.train.conftest import batch_at, start  # noqa: F401 (fixtures)

SPIKES = OptimConfig(lr=1e-3, warmup_steps=0, spike_sigmas=SIGMAS)


def poisoned(model, batch, *, factor=1.0, of_loss=1.0):
    """The loss, times `of_loss`, and a gradient that is multiplied by `factor` at one weight."""
    loss, report = next_token_loss(model, batch)
    weight = model.head.weight[0, 0]
    return of_loss * loss + (factor * weight - (factor * weight).detach() if factor != 1 else 0), of_loss * report


def copied(state: TrainState) -> dict[str, Tensor]:
    """What this rank holds of the weights."""
    return {name: to_local(tensor).clone() for name, tensor in state.weights().items()}


def poison_one_rank(world: World, where: str, bad: float):
    """Three steps of which one rank spoils the second: what each rank decided, and whether its weights moved."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        own = with_mesh(world, parallel)
        state = begin(own)
        told = []
        for number in range(3):
            is_bad = number == 1 and world.rank == 1
            spoiled = {"loss": {"of_loss": bad}, "gradient": {"factor": bad}}[where] if is_bad else {}
            before = copied(state)
            stats = train_step(state, rows(number, own), partial(poisoned, **spoiled), 1e-2, OptimConfig(), own)
            moved = any(not torch.equal(before[name], tensor) for name, tensor in copied(state).items())
            told.append((stats.skipped, moved))
        is_finite = all(torch.isfinite(tensor).all() for tensor in copied(state).values())
        found[parallel] = told, is_finite
    return found


def spike_on_one_rank(world: World, folder: Path):
    """Seventy steps, saved and read again; then one rank's loss is a hundred times as high: what each rank did."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        own = with_mesh(world, parallel)
        state, saved = begin(own), Checkpoints(folder / parallel, 1, own)
        for state.step in range(MIN_LOSSES + 6):
            train_step(state, rows(state.step % 10, own), next_token_loss, 1e-3, SPIKES, own)
        saved.save(state)
        saved.wait()
        state = begin(own)
        load_newest(folder / parallel, state, own)
        before, told = copied(state), []
        for factor in (100.0 if world.rank == 1 else 1.0, 1.0):
            loss_of = partial(poisoned, of_loss=factor)
            stats = train_step(state, rows(3, own), loss_of, 1e-3, SPIKES, own)
            told.append((stats.skipped, any(not torch.equal(before[name], t) for name, t in copied(state).items())))
        found[parallel] = told
    return found


@pytest.mark.dist
def test_a_loss_a_hundred_times_as_high_on_one_rank_is_skipped_by_all(tmp_path, record_property):
    for of_rank in together(2, spike_on_one_rank, tmp_path, dtype="float32"):
        assert of_rank == {parallel: [(True, False), (False, True)] for parallel in ("ddp", "fsdp")}
    record_property("figure", "a loss x 100 on one of two ranks, after a checkpoint: both skipped it, and moved again")


@pytest.mark.dist
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_one_rank_spoils_all_ranks_skip_in_the_same_step(where, bad, record_property):
    ranks = together(2, poison_one_rank, where, bad, dtype="float32")
    expected = [(False, True), (True, False), (False, True)]
    for of_rank in ranks:
        assert of_rank == dict.fromkeys(("ddp", "fsdp"), (expected, True))
    record_property("figure", f"{bad} in the {where} of one of two ranks: both skipped that step alone, ddp and fsdp")


def test_of_a_run_that_meets_nothing_finite_the_weights_stay_and_its_batches_are_named(
    job_of, materials, monkeypatch, capsys, record_property
):
    calls = 0

    def spoiled(model, batch, **options):
        nonlocal calls
        calls += 1
        return poisoned(model, batch, of_loss=1.0 if calls <= 2 * 5 else math.nan)  # of two micro-batches a step

    job = job_of("pretrain", "--train.steps", 20)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "next_token_loss", spoiled)
        assert main(job.words) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanollm pretrain: ")]
    shards = Shards.open(materials["text"], tokenizer_fingerprint=None)
    windows = Windows([TextShards(shards, 32)], Mixture([1]), seed=0)
    assert f"the updates of steps 6 to {5 + MAX_SKIPPED_IN_A_ROW} were all skipped" in told
    assert f"the last windows of {materials['text']} train {windows.names(14, 4).popitem()[1]}" in told
    skipped = [line for line in read_metrics(job.out) if line.get("skipped")]
    assert [line["batch"] for line in skipped] == [windows.names(step, 4) for step in range(5, 15)]
    for path in checkpoints(job.out / "checkpoints"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "weights.safetensors").values())
    assert main(job.words) == 0  # the cause is gone
    record_property(
        "figure", f"a loss that is NaN from step 6 on: {len(skipped)} updates skipped and named, then the end"
    )


def test_a_loss_a_hundred_times_as_high_moves_nothing_and_the_next_step_goes_on(start, batch_at, tmp_path):  # noqa: F811
    state = start()
    for step in range(MIN_LOSSES + 6):
        assert not train_step(state, [batch_at(step)], next_token_loss, 1e-3, SPIKES, World()).skipped
        state.step += 1
    save_checkpoint(tmp_path, state, keep_last=1)
    resumed = start()
    load_newest(tmp_path, resumed, World())
    for each in (state, resumed):  # what is usual is part of a checkpoint
        before = copied(each)
        stats = train_step(each, [batch_at(500)], partial(poisoned, of_loss=100.0), 1e-3, SPIKES, World())
        assert stats.skipped and stats.loss > 100
        assert all(torch.equal(before[name], tensor) for name, tensor in copied(each).items())
        assert not train_step(each, [batch_at(501)], next_token_loss, 1e-3, SPIKES, World()).skipped
    assert all(torch.equal(tensor, copied(state)[name]) for name, tensor in copied(resumed).items())


def test_what_stays_a_little_higher_is_soon_usual_and_what_is_far_above_never_is():
    usual = [3.0 + 0.05 * (-1) ** step for step in range(WINDOW)]

    def skipped(level):
        losses, count = usual, 0
        while level > (highest := spike_threshold(losses, SIGMAS)) and count < MAX_SKIPPED_IN_A_ROW:
            losses, count = update_window(losses, level, highest), count + 1
        return count

    assert skipped(3.2) == 0
    assert 1 <= skipped(3.5) <= 5
    assert skipped(300.0) == MAX_SKIPPED_IN_A_ROW


def test_too_few_losses_or_no_sigmas_forbid_nothing():
    assert spike_threshold([1.0] * (MIN_LOSSES - 1), SIGMAS) == math.inf
    assert spike_threshold([1.0] * WINDOW, 0.0) == math.inf
    assert spike_threshold([1.0] * WINDOW, SIGMAS) == 1.0


@pytest.mark.parametrize("stage", [pretrain, sft])
def test_runs_are_guarded_unless_they_ask_not_to_be(stage):
    (field,) = [field for field in stage.Config.__dataclass_fields__.values() if field.name == "optim"]
    assert field.default_factory().spike_sigmas == SIGMAS
