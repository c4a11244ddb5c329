"""transformers loads what we write, and nothing is missing or made up."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nanollm.bundle import Bundle
from nanollm.config import load_preset
from nanollm.export import hf
from nanollm.export.dense_to_moe import exported_shape
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

FORMS = ["compact", "deepseek-v3"]
NARROW = replace(TINY, kv_lora_rank=16)  # which can be widened


@pytest.fixture
def bundle(tokenizer) -> Bundle:
    return Bundle(randomised(Transformer(NARROW).init(0)).eval(), tokenizer, {"made_by": "a test"})


def loaded(folder):
    """The model of a folder, which has every tensor of its class and no more."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_transformers_gives_our_logits(bundle, form, dtype, tmp_path, rng):
    hf.write_model(tmp_path, bundle, form, dtype)
    model = loaded(tmp_path)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert {tensor.dtype for name, tensor in model.named_buffers() if "correction" in name} == {torch.float32}
    bundle.model.load_state_dict(hf.cast(bundle.model.state_dict(), dtype))
    tokens = torch.randint(TINY.vocab_size, (2, 33), generator=rng)
    torch.testing.assert_close(model.float()(tokens).logits, bundle.model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_large_model_lies_in_several_files(bundle, form, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    hf.write_model(tmp_path, bundle, form, torch.float32)
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    loaded(tmp_path)


@pytest.mark.parametrize("form, parameters", [("compact", 327_007_232), ("deepseek-v3", 468_583_424)])
def test_nano_327m_has_as_many_parameters_there_as_we_say(form, parameters, tokenizer, tmp_path):
    shape = ModelConfig(**load_preset("model", "nano-327m"))
    words = hf.hf_config(shape, tokenizer, form, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(words), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(model).__module__.startswith("transformers.models.")
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters
    assert exported_shape(shape, form).total_parameters == parameters


def test_a_reply_ends_where_ours_ends(tokenizer):
    words = transformers.GenerationConfig(**hf.generation_config(tokenizer))
    assert words.eos_token_id == [tokenizer.eos_id, tokenizer.mark_id("<|end|>")]


def test_numbers_that_float16_cannot_hold_are_refused(bundle, tmp_path):
    bundle.model.head.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"lm_head.weight holds numbers that are not finite in float16"):
        hf.write_model(tmp_path, bundle, "compact", torch.float16)
