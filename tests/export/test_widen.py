"""Attention widened for vLLM computes what it computed before."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanollm.bundle import Bundle, build_model
from nanollm.config import load_preset, preset_names
from nanollm.export import hf
from nanollm.export.widen import VLLM_WIDTHS, factor, to_narrow, to_wide, widened_shape
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

SHAPES = {
    "rotary pairs are moved": replace(TINY, kv_lora_rank=16),
    "all is as wide already but the latent": replace(TINY, kv_lora_rank=128, qk_rope_head_dim=64),
    "heads are wide": replace(TINY, kv_lora_rank=8, qk_nope_head_dim=80, qk_rope_head_dim=2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_nothing_is_rounded_and_all_can_be_taken_back_bit_by_bit(shape, dtype, rng):
    model, wide = randomised(Transformer(shape).init(0)).to(dtype), widened_shape(shape)
    weights = to_wide(model.state_dict(), shape, wide)
    taken = to_narrow(weights, shape, wide)
    assert taken.keys() == model.state_dict().keys()
    assert all(torch.equal(taken[name], tensor) for name, tensor in model.state_dict().items())
    (widened := build_model(wide)).load_state_dict(weights, assign=True)
    tokens = torch.randint(shape.vocab_size, (2, 60), generator=rng)
    ours, theirs = (each.double().eval()(tokens) for each in (model, widened))
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=0)  # rotary angles are of float32


@pytest.mark.parametrize(
    "name",
    [
        *("nano-1m", "nano-5m"),
        *(pytest.param(f"nano-{size}", marks=pytest.mark.slow) for size in ("20m", "60m", "327m", "327m-fine")),
    ],
)
@torch.no_grad()
def test_transformers_says_of_the_widened_preset_what_it_says_of_the_narrow_one(name, tokenizer, tmp_path, rng):
    shape = ModelConfig(**load_preset("model", name) | {"vocab_size": tokenizer.vocab_size})
    bundle, logits = Bundle(Transformer(shape).init(0), tokenizer, {}), []
    tokens = torch.randint(shape.vocab_size, (1, 100), generator=rng)
    for widen in ("auto", "off"):
        (folder := tmp_path / widen).mkdir()
        hf.write_model(folder, bundle, "deepseek-v3", torch.float32, widen)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        logits.append(model(tokens).logits)
        width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        assert width in (VLLM_WIDTHS if widen == "auto" else (shape.cache_width,))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_queries_are_multiplied_by_a_power_of_two():
    for name in preset_names("model"):
        shape = ModelConfig(**load_preset("model", name))
        assert factor(shape, widened_shape(shape)) in (1.0, 2.0)


def test_weights_that_were_trained_on_stay_wide():
    shape = SHAPES["rotary pairs are moved"]
    wide = widened_shape(shape)
    weights = to_wide(Transformer(shape).init(0).state_dict(), shape, wide)
    weights["trunk.blocks.2.attention.kv_b_proj.weight"][-1, -1] += 1e-3
    with pytest.raises(ValueError, match=r"blocks.2.attention.kv_b_proj.weight is not what .* was changed since"):
        to_narrow(weights, shape, wide)


@pytest.mark.parametrize("sizes", [{"kv_lora_rank": 20}, {"kv_lora_rank": 16, "qk_rope_head_dim": 24}])
def test_what_cannot_be_widened_without_rounding_is_refused(sizes):
    with pytest.raises(ValueError, match=r"must divide them; --widen off writes the model as it is"):
        widened_shape(replace(TINY, **sizes))
