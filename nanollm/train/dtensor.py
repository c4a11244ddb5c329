"""Helpers for tensors that may be DTensors: local part, full tensor, and back.

A tensor that is cut over several processes is a DTensor (torch.distributed.tensor); any other is whole. What makes
DTensors is imported late: half a second that one process need not wait for.
"""

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, to be changed in place."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; every process that holds a part must ask."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def gather_full(part: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole tensor of which every rank has a part, cut as `like` is; on the way in bfloat16, if that is `dtype`."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    # Not in float16: gradients may be tiny.
    sent = part.to(dtype) if dtype == torch.bfloat16 else part
    assert isinstance(like, DTensor)
    cut = DTensor.from_local(sent, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return cut.full_tensor().to(part.dtype)


def shard_like(like: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole tensor, the same on every rank, that this one holds of `like`."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
