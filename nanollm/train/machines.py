"""What can a machine do: by its data sheet, by its memory alone, or by what a second of measuring says of this one?"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from nanollm import machine as looking
from nanollm.model import fused
from nanollm.model.config import ModelConfig
from nanollm.model.layers import RMSNorm
from nanollm.world import World

Kind = Literal["cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]

GB, TERA = 1e9, 1e12
PER_HOST = 8
"""GPUs of one host."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one process computes on: a GPU, or the cores of a CPU."""

    name: str
    kind: Kind
    memory: int
    """Bytes."""
    tflops: float | None = None
    """Most of its products in the type that training computes in, without sparsity; None: nobody knows."""
    gb_per_s: float | None = None
    """What its memory reads and writes."""
    norm_gb_per_s: float | None = None
    """What a norm reads and writes, whose operations a CPU does one after the other; None: as gb_per_s."""
    link_gb_per_s: float = 32.0
    """What it sends to another one of its host: NVLink, else PCIe 4."""
    dtype: Dtype = "bfloat16"
    """What training computes in."""
    is_fused: bool = False
    """attention.cpp serves (nanollm/model/fused.py)."""

    @property
    def compute_bytes(self) -> Literal[2, 4]:
        return 4 if self.dtype == "float32" else 2

    @property
    def usable(self) -> int:
        """Bytes that a run may take."""
        return self.memory - round(RESERVED[self.kind] * self.memory) - BESIDE[self.kind]


RESERVED = {"cpu": 0.1, "cuda": 0.05}
"""Share of the memory that is left to the system, or that a GPU's allocator holds in pieces too small to use. A rule of
thumb, not measured."""
BESIDE = {"cpu": 390_000_000, "cuda": 600_000_000}
"""Bytes that a process takes before it has a model: Python and PyTorch (measured), or a CUDA context (a rule of
thumb)."""


def gpu(
    name: str, memory_gb: float, tflops: float, gb_per_s: float, link_gb_per_s: float, dtype: Dtype = "bfloat16"
) -> Machine:
    return Machine(
        name=name,
        kind="cuda",
        memory=round(memory_gb * GB),
        tflops=tflops,
        gb_per_s=gb_per_s,
        link_gb_per_s=link_gb_per_s,
        dtype=dtype,
    )


GPUS = {
    each.name: each
    for each in (
        gpu("t4", 16, 65, 320, 16, "float16"),
        gpu("v100", 32, 125, 900, 150, "float16"),
        gpu("rtx3090", 24, 71, 936, 32),
        gpu("rtx4090", 24, 165.2, 1008, 32),
        gpu("rtx5090", 32, 209.5, 1792, 64),
        gpu("l4", 24, 121, 300, 32),
        gpu("a10", 24, 125, 600, 32),
        gpu("l40s", 48, 362, 864, 32),
        gpu("a100-40gb", 40, 312, 1555, 300),
        gpu("a100-80gb", 80, 312, 2039, 300),
        gpu("h100", 80, 989.4, 3350, 450),
        gpu("h200", 141, 989.4, 4800, 450),
        gpu("b200", 180, 2250, 8000, 900),
    )
}
"""GB of memory, TFLOP/s of dense products in bfloat16, or float16 where there is no other, added up in float32, GB/s of
memory, GB/s one way to a neighbour. NVIDIA's data sheets: T4 70 W; V100 SXM2; L4; A10; L40S; A100 SXM; H100 SXM; H200
SXM; HGX B200 (an eighth of the board). GeForce: appendix of the architecture white papers of GA102, Ada and Blackwell
(RTX). Links: NVLink 2, 3, 4 and 5 of the SXM parts, else the 16 lanes of PCIe 3 (T4), 4, or 5 (RTX 5090)."""
BYTES_PER_FLOP = 4800 / 989.4e3
"""Of an H200: what a GPU is taken to move whose TFLOP/s alone are given."""


# --- by name ---


def known_gpu(name: str) -> Machine:
    """By its name, however it is written, or by its memory alone."""
    spelled = {re.sub(r"[^a-z0-9]", "", known): gpu for known, gpu in GPUS.items()}
    if (gpu := spelled.get(re.sub(r"[^a-z0-9]", "", name.lower()))) is not None:
        return gpu
    if re.match(r"[\d.]", name) is None:
        raise ValueError(f"unknown GPU {name}; known are {', '.join(GPUS)}; of another give the memory: --gpu 24GB")
    return Machine(name=f"GPU of {name}", kind="cuda", memory=memory_in(name, "gpu"))


def memory_in(text: str, option: str) -> int:
    """Bytes in a text such as 8GB or 0.5GB."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?gb?", text.strip().lower())
    if match is None or not 0 < float(match[1]) < 1e6:
        raise ValueError(f"{option}: expected gigabytes such as 24GB, got {text}")
    return round(float(match[1]) * GB)


# --- this one ---

BEST_PRODUCT = 735 / 989.4
"""Of its data sheet, an H200's best product of nano-327m's shapes: what is measured here is a product, too."""
MOVED = 2**26
"""float32 numbers: 256 MiB, far beyond any cache."""


def this_machine(c: ModelConfig, world: World, memory: int | None) -> Machine:
    """What this machine computes such a model on, and how fast it does so at the moment; memory None: all it has."""
    device, kind = world.device, world.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"this machine computes on {kind}, which the planner does not know; give --gpu or --cpu")
    is_gpu, tflops = kind == "cuda", looking.measure_gemm(device, world.dtype) / 1e3
    return Machine(
        name=torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} CPU threads, here",
        kind="cuda" if is_gpu else "cpu",
        memory=memory_here(device) if memory is None else memory,
        tflops=tflops / BEST_PRODUCT if is_gpu else tflops,
        gb_per_s=measure_moving(device),
        norm_gb_per_s=None if is_gpu else measure_norm(device, world.dtype),
        dtype=DTYPES[world.dtype],
        is_fused=fused.fits(c, world.dtype, device),
    )


DTYPES: dict[torch.dtype, Dtype] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}


def memory_here(device: torch.device) -> int:
    """All bytes of it, whoever else uses them now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if (known := looking.memory()) is None:
        raise ValueError("this system does not say how much memory it has; give it, such as --memory 16GB")
    return known[1]


def measure_moving(device: torch.device, limit_s: float = 0.25) -> float:
    """GB/s that one operation reads and writes in memory, far beyond any cache."""
    numbers = torch.ones(MOVED, device=device)
    return 2 * numbers.nbytes / GB / least_s(lambda: numbers.add_(1), limit_s)


@torch.no_grad()
def measure_norm(device: torch.device, dtype: torch.dtype, limit_s: float = 0.25) -> float:
    """GB/s that a norm reads and writes: small operations in a row, as there are between products."""
    vectors, norm = torch.ones(2048, 512, dtype=dtype, device=device), RMSNorm(512, eps=1e-6).to(device, dtype)
    return 2 * vectors.nbytes / GB / least_s(lambda: norm(vectors), limit_s)


def least_s(work: Callable[[], torch.Tensor], limit_s: float) -> float:
    """Seconds of the fastest of some calls, at least one; the first is for warming up."""
    work().view(-1)[0].item()
    times, begun = list[float](), time.perf_counter()
    while not times or time.perf_counter() - begun < limit_s:
        started = time.perf_counter()
        work().view(-1)[0].item()  # the item waits for the device
        times.append(time.perf_counter() - started)
    return min(times)
