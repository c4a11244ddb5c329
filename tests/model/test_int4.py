"""Four bits per weight are those of llama.cpp's q4_0."""

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from nanollm.model import int4


def test_numbers_and_scales_are_those_of_q4_0_to_the_bit(rng):
    weight = (
        torch.randn(300, 96, generator=rng) * torch.logspace(-9, 4, 300)[:, None]
    )  # scales that float16 rounds to 0
    weight[0], weight[1, :40] = 0, 0.25
    weight[2] = torch.arange(96) / 8 - 6  # ties
    blocks = quantize(weight.numpy(), GGMLQuantizationType.Q4_0).reshape(300, 3, 18)
    numbers, scales = int4.quantize(weight)
    pairs = numbers.view(300, 3, 2, 16)
    assert np.array_equal((pairs[:, :, 0] | pairs[:, :, 1] << 4).numpy(), blocks[..., 2:])
    assert np.array_equal(scales[..., None].view(torch.uint8).numpy(), blocks[..., :2])
