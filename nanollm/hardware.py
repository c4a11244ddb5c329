"""Hardware: GPUs by their data sheets; this machine's cores, load, memory and rate of matrix products as found.

Units: a GB is 1e9 bytes; TFLOP/s are those of dense matrix products, without sparsity.
"""

import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

GB, TERA = 1e9, 1e12
GPUS_PER_HOST = 8
CGROUP = Path("sys/fs/cgroup")
"""Of a container, which sees its own control group (version 2) here."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one process trains on: a GPU, or the cores of a CPU."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int | None
    """Bytes; None: this system does not say."""
    tflops: float | None = None
    """Peak in the type that training computes in; None: unknown."""
    dtype: str = "bfloat16"
    """What training computes in."""


GPUS = {
    name: Hardware(name=name, kind="cuda", memory=gb * 10**9, tflops=tflops, dtype=dtype)
    for name, gb, tflops, dtype in (
        ("t4", 16, 65, "float16"),
        ("v100", 32, 125, "float16"),
        ("rtx3090", 24, 71, "bfloat16"),
        ("rtx4090", 24, 165.2, "bfloat16"),
        ("rtx5090", 32, 209.5, "bfloat16"),
        ("l4", 24, 121, "bfloat16"),
        ("a10", 24, 125, "bfloat16"),
        ("l40s", 48, 362, "bfloat16"),
        ("a100-40gb", 40, 312, "bfloat16"),
        ("a100-80gb", 80, 312, "bfloat16"),
        ("h100", 80, 989.4, "bfloat16"),
        ("h200", 141, 989.4, "bfloat16"),
        ("b200", 180, 2250, "bfloat16"),
    )
}
"""Memory in GB, TFLOP/s accumulated in float32, type. NVIDIA's data sheets: T4 70 W; V100, A100, H100, H200 SXM; L4;
A10; L40S; HGX B200 (one eighth). GeForce: appendix of the architecture white papers."""


def known_gpu(name: str) -> Hardware:
    """A GPU by its name, however it is written, or by its memory alone, such as 24GB. ValueError: unknown."""
    spelled = {re.sub(r"[^a-z0-9]", "", known): known for known in GPUS}
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    if word in spelled:
        return GPUS[spelled[word]]
    if match := re.fullmatch(r"([\d.]+) ?gb?", name.strip().lower()):
        return Hardware(name=f"GPU of {name}", kind="cuda", memory=round(float(match[1]) * GB))
    raise ValueError(f"unknown GPU {name}; known are {', '.join(GPUS)}; of another give the memory: --gpu 24GB")


# --- this machine ---


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process can keep busy: those it may run on, or fewer if its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    limit = root / CGROUP / "cpu.max"
    if limit.is_file() and not limit.read_text().startswith("max"):
        quota, period = map(int, limit.read_text().split())
        cores = min(cores, max(1, round(quota / period)))
    return cores


def load() -> float:
    """Processes that wanted a core, on average over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def is_shared() -> bool:
    """Whether other programs are at work: what is measured now is slower than this machine is."""
    return load() > usable_cores() / 2


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes free and in all, for this process within its container; None where the system is not Linux."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines()}
    free, total = known["MemAvailable"], known["MemTotal"]
    group = root / CGROUP
    if (group / "memory.max").is_file() and (most := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files make room when asked.
        in_use = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free, total = min(free, int(most) - in_use), min(total, int(most))
    return free, total


def measure_gemm(device: torch.device, dtype: torch.dtype, limit_s: float = 0.25) -> float:
    """TFLOP/s of the fastest of some matrix products; 0 where the device has none in this type."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    try:
        (a @ a)[0, 0].item()  # the first one is slow; item waits for the device
    except (RuntimeError, TypeError):
        return 0.0
    fastest, end = math.inf, time.perf_counter() + limit_s
    while (started := time.perf_counter()) < end:
        (a @ a)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest / TERA
