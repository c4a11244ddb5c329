"""A machine is known by its name, by its memory, or by measuring it."""

import dataclasses

import pytest
import torch

from nanollm import machine
from nanollm.model.config import ModelConfig
from nanollm.settings import load_preset
from nanollm.train.machines import GPUS, known_gpu, measure_moving, measure_norm, memory_in, this_machine
from nanollm.world import World

MODEL = ModelConfig(**load_preset("model", "nano-1m"))
MPS = dataclasses.replace(World(), device=torch.device("mps"))


def test_a_gpus_name_is_found_however_it_is_written():
    assert known_gpu("RTX 4090") is known_gpu("rtx-4090") is GPUS["rtx4090"]
    assert known_gpu("A100_80GB") is GPUS["a100-80gb"]


def test_a_gpu_of_which_only_the_memory_is_known_has_no_rate():
    found = known_gpu("8GB")
    assert (found.memory, found.tflops, found.gb_per_s) == (8_000_000_000, None, None)


def test_memory_is_read_with_its_unit():
    assert memory_in("8GB", "gpu") == memory_in("8 g", "gpu") == 8_000_000_000
    assert memory_in("0.5gb", "gpu") == 500_000_000


def test_a_run_may_not_take_all_of_a_machine():
    for each in GPUS.values():
        assert 0.85 * each.memory < each.usable < 0.95 * each.memory


def test_this_machine_is_measured_and_has_the_memory_that_it_has():
    world = World.start("cpu")
    here = this_machine(MODEL, world, memory=None)
    known = machine.memory()
    assert known is not None and here.memory == known[1]
    assert here.dtype == world.names["dtype"]
    assert here.tflops and here.gb_per_s and here.norm_gb_per_s
    assert this_machine(MODEL, world, memory=4).memory == 4


@pytest.mark.parametrize("measure", [measure_moving, lambda device, s: measure_norm(device, torch.float32, s)])
def test_rates_are_in_gigabytes_a_second(measure):
    assert 0.01 < measure(torch.device("cpu"), 0.05) < 5000


def test_a_device_that_nobody_planned_for_is_refused():
    with pytest.raises(ValueError, match="computes on mps, which the planner does not know; give --gpu or --cpu"):
        this_machine(MODEL, MPS, memory=None)
