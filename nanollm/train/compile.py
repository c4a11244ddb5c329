"""Speed and memory options applied to a model from outside: torch.compile, recomputation, attention kernels.

None of it changes what is computed, only the rounding where operations are fused.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanollm.kernels import build
from nanollm.model.moe import Experts
from nanollm.model.transformer import Transformer
from nanollm.progress import say

HOPPER = (9, 0)
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What makes training fast, or small."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block, and on GPUs the loss, with torch.compile; auto: on GPUs, where it pays off within minutes. On
    a CPU it takes about a minute the first time, ten seconds from then on, and saves about a tenth of each step."""
    recompute: bool = False
    """Activation checkpointing: keep only the input of each block and recompute the rest in the backward pass. A third
    more work, a fraction of the activation memory (nanollm info MODEL --recompute)."""


def compile_blocks(model: Transformer, c: SpeedConfig, device: torch.device) -> bool:
    """Compile a model's blocks, if that is wanted and possible; whether it was done.

    ValueError where compiling was asked for and is not possible.
    """
    if c.compile == "off" or (c.compile == "auto" and device.type != "cuda"):
        return False
    if missing := missing_for_compiling(device):
        if c.compile == "on":
            raise ValueError(f"speed.compile on needs {missing}; install it, or take --speed.compile off")
        say(f"training without torch.compile, more slowly: it needs {missing}")
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(build.cache_folder() / "inductor"))
    # Experts get other numbers of tokens in each step. As a decorator it would have every command import the compiler.
    Experts.one_by_one = torch.compiler.disable(Experts.one_by_one)  # type: ignore[method-assign]
    for block in model.trunk.blocks:  # blocks of a kind share what is compiled
        block.compile(dynamic=False)
    say("compiling: the first step takes a minute or more, and seconds where the same was compiled before")
    return True


def missing_for_compiling(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, in words."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    command = build.find_compiler()
    if not command:
        return "a C++ compiler (on Debian and Ubuntu: sudo apt install g++)"
    return None if shutil.which(command[0]) else f"a C++ compiler: {command[0]}, which CXX names, is not there"


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """On Hopper GPUs and newer ones cuDNN's attention is asked first, which PyTorch would ask last."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        with sdpa_kernel(FASTEST_FIRST, set_priority=True):
            yield
    else:
        yield
