"""Four bits per weight are those of llama.cpp's q4_0."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from nanollm.model import int4


@pytest.fixture
def weight(rng):
    """(300, 96): scales that float16 rounds to 0 and large ones, zeros, equal numbers and ties."""
    weight = torch.randn(300, 96, generator=rng) * torch.logspace(-9, 4, 300)[:, None]
    weight[0], weight[1, :40] = 0, 0.25
    weight[2] = torch.arange(96) / 8 - 6
    return weight


def test_numbers_and_scales_are_those_of_q4_0_to_the_bit(weight):
    blocks = quantize(weight.numpy(), GGMLQuantizationType.Q4_0).reshape(300, 3, 18)
    numbers, scales = int4.quantize(weight)
    pairs = numbers.view(300, 3, 2, 16)
    assert np.array_equal((pairs[:, :, 0] | pairs[:, :, 1] << 4).numpy(), blocks[..., 2:])
    assert np.array_equal(scales[..., None].view(torch.uint8).numpy(), blocks[..., :2])


def test_what_training_rounds_every_type_holds(weight):
    rounded = int4.rounded("head.weight", weight)
    assert torch.equal(int4.rounded("head.weight", rounded), rounded)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(rounded.to(dtype).float(), rounded)
        numbers, scales = int4.quantize(rounded.to(dtype))
        assert torch.equal((numbers.unflatten(-1, (-1, 32)).float() - 8).mul(scales[..., None]).flatten(-2), rounded)
    for kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_0):
        assert np.array_equal(dequantize(quantize(rounded.numpy(), kind), kind), rounded.numpy())
    error, step = (rounded - weight).abs().unflatten(-1, (-1, 32)), weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 8
    error[step < 2**-19] = 0  # all zeros
    assert (error <= 1.3 * step[..., None]).all()  # the greatest number of one sign has 7 steps, not 8
    wide = int4.rounded("trunk.blocks.0.attention.kv_b_proj.weight", weight)
    assert torch.equal(wide.bfloat16().half().float(), wide)
    torch.testing.assert_close(wide, weight, rtol=2**-8, atol=2**-24)


def test_a_model_that_was_trained_for_it_is_known_by_its_weights(weight):
    rounded = {"head.weight": int4.rounded("head.weight", weight)}
    assert int4.was_trained_for_it(rounded)
    assert not int4.was_trained_for_it(rounded | {"trunk.embed.weight": weight})
    assert not int4.was_trained_for_it(rounded | {"trunk.embed.weight": weight[:, :40]})
