"""What stands in a GGUF; that llama.cpp reads it in the same way is in test_verify.py."""

from dataclasses import replace

import pytest
import torch
from gguf import GGUFReader

from nanollm.bundle import Bundle, load_bundle
from nanollm.export import gguf
from nanollm.model import int4
from nanollm.model.lora import LoraConfig, add_lora, plain_name
from nanollm.model.transformer import Transformer
from nanollm.text.train_tokenizer import Sample, train_on
from tests.conftest import STORY
from tests.model.conftest import TINY, randomised

FEW_BITS = ["q8_0", "q5_0", "q4_0"]


@pytest.mark.parametrize(
    "dtype, types",
    [("f32", {"F32"}), ("f16", {"F16", "F32"}), *((dtype, {dtype.upper(), "F16", "F32"}) for dtype in FEW_BITS)],
)
def test_every_number_of_the_model_is_there(trained, tmp_path, dtype, types):
    bundle = load_bundle(trained)
    gguf.write_gguf(tmp_path / "model.gguf", bundle, dtype)
    tensors = GGUFReader(tmp_path / "model.gguf").tensors
    biases = sum(layer.balance_bias.numel() for layer in bundle.model.moe_layers())
    assert sum(int(tensor.n_elements) for tensor in tensors) == bundle.model.config.total_parameters + biases
    assert {tensor.tensor_type.name for tensor in tensors} == types
    exact = {"F32"} if dtype == "f32" else {"F32", "F16"}
    kinds = {tensor.name.split(".", 2)[-1]: tensor.tensor_type.name for tensor in tensors}
    assert kinds["ffn_gate_inp.weight"] == kinds["exp_probs_b.bias"] == kinds["attn_norm.weight"] == "F32"
    assert {kinds["attn_k_b.weight"], kinds["attn_kv_a_mqa.weight"]} <= exact


@pytest.mark.parametrize("d_ff", [40, 72], ids=["into the shared expert", "into routed experts too"])
def test_what_stands_in_a_file_is_read_as_it_was_written(d_ff, tokenizer, tmp_path):
    model = randomised(Transformer(replace(TINY, vocab_size=tokenizer.vocab_size, d_ff=d_ff)).init(0))
    gguf.write_gguf(tmp_path / "model.gguf", Bundle(model, tokenizer, {}), "f32")
    found, expected = gguf.read_weights(tmp_path / "model.gguf", model.config), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("d_ff", [256, 384], ids=["into the shared expert", "into routed experts too"])
def test_of_a_model_trained_for_int4_nothing_is_lost(d_ff, trained, tokenizer, tmp_path):
    config = replace(load_bundle(trained).model.config, d_ff=d_ff)
    model = randomised(Transformer(config).init(0))
    exact = {name: int4.rounded(name, weight) for name, weight in model.state_dict().items()}
    model.load_state_dict(exact)
    for dtype in ("q4_0", "q5_0", "f16", "bf16"):
        gguf.write_gguf(tmp_path / "model.gguf", Bundle(model, tokenizer, {}), dtype)
        found = gguf.read_weights(tmp_path / "model.gguf", config)
        assert all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("dtype", ["f16", *FEW_BITS])
def test_numbers_that_the_type_cannot_hold_are_refused(dtype, trained, tmp_path):
    bundle = load_bundle(trained)
    bundle.model.head.weight.data[0, 0] = 1e8
    with pytest.raises(ValueError, match=r"output.weight holds numbers that are not finite in float16"):
        gguf.write_gguf(tmp_path / "model.gguf", bundle, dtype)


def test_ids_that_the_tokenizer_lacks_are_unused_tokens(trained, tmp_path):
    bundle = load_bundle(trained)
    gguf.write_gguf(tmp_path / "model.gguf", bundle, "f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert len(kinds) == bundle.model.config.vocab_size == bundle.tokenizer.vocab_size + 8
    assert kinds[-8:] == [gguf.KIND_NUMBERS["unused"]] * 8
    assert len(set(fields["tokenizer.ggml.tokens"].contents())) == len(kinds)


def test_what_llama_cpp_would_read_in_another_way_is_refused(tokenizer):
    unigram = train_on(Sample([STORY.read_bytes()], 0), vocab_size=400, model_type="unigram")
    deep = Bundle(Transformer(replace(TINY, n_blocks=26)), tokenizer, {})
    with pytest.raises(ValueError, match="takes a model of 26 blocks for DeepSeek-V2-Lite"):
        gguf.check_fits(deep.model.config, deep.tokenizer)
    with pytest.raises(ValueError, match="needs pieces of the type bpe, this bundle's are unigram"):
        gguf.check_fits(TINY, unigram)


@pytest.mark.parametrize("target", gguf.WITHOUT_ADAPTER)
def test_an_adapter_that_llama_cpp_would_ignore_is_refused_by_name(target, tmp_path):
    add_lora(model := Transformer(TINY), lora := LoraConfig(rank=2, targets=[target, "o_proj"]), seed=0)
    weights = {plain_name(name): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    with pytest.raises(ValueError, match=f"llama.cpp ignores the adapter of {target}; train one with --lora.targets"):
        gguf.write_adapter(tmp_path / "adapter.gguf", TINY, lora, weights)
    assert not list(tmp_path.iterdir())
