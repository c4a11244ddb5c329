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


@pytest.mark.parametrize(("text", "memory"), [("8GB", 8 * 10**9), ("8 g", 8 * 10**9), ("0.5gb", 5 * 10**8)])
def test_a_gpu_of_which_only_the_memory_is_known_has_no_rate(text, memory):
    found = known_gpu(text)
    assert (found.memory, found.tflops, found.gb_per_s) == (memory, None, None)


def tree(root: Path, own: str, files: dict[str, str]) -> Path:
    """A root of a system whose process is in the control group `own`."""
    for name, content in {"proc/self/cgroup": own, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be made fewer")
@pytest.mark.parametrize(
    ("own", "folder", "quota", "cores"),
    [
        ("0::/\n", "", "100000 100000\n", 1),
        ("0::/a/b\n", "a", "50000 100000\n", 1),
        ("0::/of/the/host\n", "", "50000 100000\n", 1),
        ("0::/../elsewhere\n", "", "50000 100000\n", 1),
        ("0::/\n", "", "max 100000\n", None),
        ("0::/\n", "", "99900000 100000\n", None),
    ],
)
def test_a_containers_quota_makes_cores_fewer_and_never_more(tmp_path, own, folder, quota, cores):
    root = tree(tmp_path, own, {f"sys/fs/cgroup/{folder}/cpu.max": quota})
    assert hardware.usable_cores(root) == (cores or hardware.usable_cores(tmp_path / "without"))


def test_memory_is_what_the_container_has_left_and_cached_files_count_as_free(tmp_path):
    assert hardware.memory(tmp_path) is None
    meminfo = {"proc/meminfo": "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\nHugePages_Total: 0\n"}
    assert hardware.memory(tree(tmp_path, "0::/\n", meminfo)) == (60_000_000 * 1024, 64_000_000 * 1024)
    limits = {"max": "4000000000\n", "current": "3000000000\n", "stat": "anon 5\ninactive_file 500000000\n"}
    group = {f"sys/fs/cgroup/memory.{name}": content for name, content in limits.items()}
    assert hardware.memory(tree(tmp_path, "0::/\n", group)) == (1_500_000_000, 4_000_000_000)


def test_a_matrix_product_is_timed_or_found_impossible():
    assert hardware.measure_gemm(torch.device("cpu"), torch.float32, 0.01) > 1e-4
    assert hardware.measure_gemm(torch.device("cpu"), torch.bool) == 0
