"""What leaves under the names of others comes back under ours."""

from dataclasses import replace

import pytest
import torch

from nanollm.config import load_preset, preset_names
from nanollm.export import names
from nanollm.export.hf import hf_config
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised


def test_tensors_come_back_under_our_names():
    weights = randomised(Transformer(TINY).init(0)).state_dict()
    back = names.to_ours(names.to_theirs(weights, TINY), TINY)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("preset", preset_names("model"))
def test_the_shape_comes_back_from_the_compact_config(preset, tokenizer):
    shape = ModelConfig(**load_preset("model", preset))
    assert names.from_hf_config(hf_config(shape, tokenizer, "compact", torch.float32)) == shape


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_shape_comes_back_from_the_config_of_deepseek_v3(first, tokenizer):
    shape = replace(TINY, moe_every=1, n_dense_first=first)
    assert names.from_hf_config(hf_config(shape, tokenizer, "deepseek-v3", torch.float32)) == shape


@pytest.mark.parametrize(
    "kinds, pattern",
    [
        ("dddsddds", (4, 0)),
        ("ddds", (4, 0)),
        ("ssss", (1, 0)),
        ("dsss", (1, 1)),
        ("dddsds", (2, 2)),
        ("dddddsds", (2, 4)),
        ("ddsddd", None),
        ("dddddsddds", None),
        ("dddd", None),
    ],
)
def test_which_blocks_are_mixtures_is_one_number_or_two(kinds, pattern):
    is_moe = [kind == "s" for kind in kinds]
    if pattern is None:
        with pytest.raises(ValueError, match="every n-th block"):
            names.pattern_of(is_moe)
    else:
        assert names.pattern_of(is_moe) == pattern
