"""Which process is this, on which device, computing in which type?

Ranks and devices are a value that is passed down; nothing below asks the environment.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    """What the model computes in; master weights are always float32."""

    @classmethod
    def start(cls, device: DeviceName = "auto", dtype: DtypeName = "auto") -> "World":
        """Choose device and compute type for this machine. Raises ValueError for what it does not have."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ValueError(
                f"this version trains in one process, got {processes} from torchrun; run the command without torchrun"
            )
        chosen = _choose_device(device)
        return cls(device=chosen, dtype=best_dtype(chosen) if dtype == "auto" else getattr(torch, dtype))

    @property
    def names(self) -> dict[str, str]:
        """What is really used, as the words of a configuration."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def total(self, number: float) -> float:
        """The sum of a number over all ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.item()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put in place of each tensor its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)


def _choose_device(name: DeviceName) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in available.items() if is_there))
    if not available[name]:
        found = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ValueError(f"device {name} was asked for, this machine has: {found}; choose one of these or auto")
    return torch.device(name)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, float16 on older CUDA devices, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        multiplies_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if multiplies_bfloat16 else torch.float32
    return torch.float32
