"""GPUs are found by name; of this machine the numbers are read right."""

import os
from pathlib import Path

import pytest
import torch

from nanollm import hardware
from nanollm.hardware import GPUS, known_gpu


def test_a_gpus_name_is_found_however_it_is_written():
    assert known_gpu("RTX 4090") is known_gpu("rtx-4090") is GPUS["rtx4090"]
    assert known_gpu("A100_80GB") is GPUS["a100-80gb"]


def test_a_gpu_of_which_only_the_memory_is_known_has_no_rate():
    found = known_gpu("0.5gb")
    assert (found.memory, found.tflops) == (5 * 10**8, None)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be made fewer")
@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("max 100000", None), ("99900000 100000", None)])
def test_a_containers_quota_makes_cores_fewer_and_never_more(tmp_path, quota, cores):
    root = tree(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert hardware.usable_cores(root) == (cores or hardware.usable_cores(tmp_path / "without"))


def test_memory_is_what_the_container_has_left_and_cached_files_count_as_free(tmp_path):
    assert hardware.memory(tmp_path) is None
    meminfo = {"proc/meminfo": "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\nHugePages_Total: 0\n"}
    assert hardware.memory(tree(tmp_path, meminfo)) == (60_000_000 * 1024, 64_000_000 * 1024)
    limits = {"max": "4000000000\n", "current": "3000000000\n", "stat": "anon 5\ninactive_file 500000000\n"}
    tree(tmp_path, {f"sys/fs/cgroup/memory.{name}": content for name, content in limits.items()})
    assert hardware.memory(tmp_path) == (1_500_000_000, 4_000_000_000)


def test_a_matrix_product_is_timed_or_found_impossible():
    assert hardware.measure_gemm(torch.device("cpu"), torch.float32, 0.01) > 1e-4
    assert hardware.measure_gemm(torch.device("cpu"), torch.bool) == 0
