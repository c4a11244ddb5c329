"""The shared parts compute what PyTorch does, and keep little for their gradients (faults/test_gradients.py)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.model.layers import RMSNorm, rotary_table, rotate, swiglu


def some(rng, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_the_norm_and_the_gated_network_compute_what_pytorch_does(rng):
    norm = RMSNorm(5, 1e-3).double()
    x, norm.weight.data = some(rng, 2, 3, 5), some(rng, 5)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (5,), norm.weight, 1e-3))
    x, gate, up, down = some(rng, 2, 3, 4), some(rng, 5, 4), some(rng, 5, 4), some(rng, 4, 5)
    torch.testing.assert_close(swiglu(x, gate, up, down), F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_kept_in_a_wider_type_or_twice(rng, dtype):
    x = torch.randn(6, 64, generator=rng).to(dtype).requires_grad_()
    gate, up, down = (torch.randn(*shape, generator=rng).to(dtype) for shape in ((96, 64), (96, 64), (64, 96)))
    norm, table = RMSNorm(64, 1e-6).to(dtype), rotary_table(torch.arange(6), 64, 100.0)
    for function, floats in (
        (norm, 64 + 2 * 1),  # x, and a float32 per vector
        (lambda x: rotate(x[None, :, None], table), 2 * 64),  # angles only, in float32
        (lambda x: swiglu(x, gate.requires_grad_(), up.requires_grad_(), down.requires_grad_()), 64 + 2 * 96),
    ):
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            function(x)
        weights = {parameter.data_ptr() for parameter in (gate, up, down, norm.weight)}
        assert sum(size for at, size in kept.items() if at not in weights) <= 6 * floats * dtype.itemsize
