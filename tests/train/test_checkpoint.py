"""Resumed = uninterrupted. That nothing damaged is loaded: faults/test_corruption.py."""

import pytest
import torch

from nanollm.train.checkpoint import Checkpoints, checkpoints, load_newest, save_checkpoint, verify
from nanollm.train.loss import next_token_loss
from nanollm.train.optim import OptimConfig
from nanollm.train.step import train_step
from nanollm.world import World


def train(state, batch_at, steps):
    for step in range(state.step, state.step + steps):
        train_step(state, [batch_at(step)], next_token_loss, 1e-2, OptimConfig(), World())
        state.step += 1
    return state


def bits(state):
    """Everything that decides how training goes on."""
    slots = {
        (name, kind): value
        for optimizer in state.optimizers
        for name, master in state.masters.items()
        for kind, value in optimizer.state.get(master, {}).items()
    }
    return {**state.weights(), **slots, **dict(state.model.named_parameters(prefix="model"))}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_training_has_the_bits_of_uninterrupted_training(start, batch_at, tmp_path, name, dtype):
    expected = bits(train(start(dtype, name=name), batch_at, 10))
    save_checkpoint(tmp_path, train(start(dtype, name=name), batch_at, 5), keep_last=1)
    resumed = start(dtype, name=name)
    assert load_newest(tmp_path, resumed, World())
    got = bits(train(resumed, batch_at, 5))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_only_the_newest_checkpoints_are_kept(start, tmp_path):
    state = start()
    for state.step in (1, 2, 10):
        save_checkpoint(tmp_path, state, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000002"]


def test_what_a_killed_save_did_not_delete_is_deleted_by_the_next_start(start, tmp_path):
    state = start()
    for state.step in (1, 2):
        save_checkpoint(tmp_path, state, keep_last=2)
    Checkpoints(tmp_path, 1, World()).delete_older()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_damaged_newer_checkpoint_takes_no_place_from_sound_ones(start, batch_at, tmp_path):
    state = train(start(), batch_at, 1)
    save_checkpoint(tmp_path, state, keep_last=2)
    damaged = save_checkpoint(tmp_path, train(state, batch_at, 9), keep_last=2)
    (damaged / "state.json").unlink()
    resumed = start()
    assert load_newest(tmp_path, resumed, World())
    save_checkpoint(tmp_path, train(resumed, batch_at, 1), keep_last=1)
    again = start()
    assert load_newest(tmp_path, again, World())
    assert again.step == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000010.damaged"}


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew_by_itself(start, tmp_path):
    path = save_checkpoint(tmp_path, start(), keep_last=1)
    (path / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
            load_newest(tmp_path, start(), World())


def test_a_checkpoint_that_a_save_was_replacing_is_not_lost(start, batch_at, tmp_path):
    path = save_checkpoint(tmp_path, train(start(), batch_at, 1), keep_last=1)
    path.rename(path.with_suffix(".old"))  # killed between the two renames
    state = start()
    assert load_newest(tmp_path, state, World())
    assert state.step == 1


def test_a_run_may_change_its_compute_type(start, batch_at, tmp_path):
    """float16 scales its loss; the scale must not follow the weights into another type, nor be lost on the way."""
    save_checkpoint(tmp_path, train(start(torch.float16), batch_at, 2), keep_last=1)
    norms = []
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        state = start(dtype)
        load_newest(tmp_path, state, World())
        norms.append(train_step(state, [batch_at(2)], next_token_loss, 0.0, OptimConfig(), World()).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert norms[2] == pytest.approx(norms[1], rel=0.05)


def test_what_a_killed_save_left_behind_is_removed_and_never_loaded(start, tmp_path):
    save_checkpoint(tmp_path, start(), keep_last=1)
    (tmp_path / "step-00000099.tmp").mkdir()
    (tmp_path / "step-00000099.tmp" / "weights.safetensors").write_bytes(b"half")
    state = start()
    assert load_newest(tmp_path, state, World())
    assert state.step == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_an_empty_folder_starts_from_nothing(start, tmp_path):
    assert not load_newest(tmp_path / "none", start(), World())


def test_a_file_that_is_not_of_the_checkpoint_is_not_read(start, batch_at, tmp_path):
    path = save_checkpoint(tmp_path, train(start(), batch_at, 1), keep_last=1)
    (path / "stranger.safetensors").write_bytes((path / "weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"stranger.safetensors is not of this checkpoint"):
        verify(path)
