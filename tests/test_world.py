"""A run knows its device and type, and is told what the machine does not have."""

import pytest
import torch

from nanollm.world import World, choose_dtype


def test_one_process_on_the_cpu():
    world = World.start("cpu", "float32")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert (world.device, world.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpus_compute_in_bfloat16_only_where_the_hardware_multiplies_it(monkeypatch, fast, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_computes_in_bfloat16_or_else_float16(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert choose_dtype("auto", torch.device("cuda")) == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda was asked for, this machine has: cpu"):
        World.start("cuda")
