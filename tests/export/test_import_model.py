"""What an export wrote comes back, bit by bit, and what others trained further computes as it did there."""

import dataclasses
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanollm.bundle import Bundle, build_model
from nanollm.durable import sha256_of
from nanollm.export.hf import DTYPES, HfFormat, write_model
from nanollm.export.import_model import import_model
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

NARROW = dataclasses.replace(TINY, kv_lora_rank=16)  # which can be widened
EVEN = dataclasses.replace(NARROW, n_blocks=6, moe_every=2, n_dense_first=2)  # its dense blocks fit the shared expert
SPLIT = dataclasses.replace(EVEN, n_shared_experts=1, d_ff=72, d_expert=24)  # channels go into routed experts, too


def model_of(imported, dtype=torch.float32):
    model = build_model(imported.config)
    model.load_state_dict(imported.weights, assign=True)
    return model.to(dtype).eval()


@pytest.fixture
def exported(tmp_path, tokenizer):
    """exported(shape, form, dtype): the shape with the ids of a tokenizer, and the folder of its export."""

    def make(shape, form, dtype=torch.float32, widen="auto"):
        shape, folder = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), tmp_path / "exported"
        folder.mkdir()
        write_model(folder, Bundle(randomised(Transformer(shape).init(0)).eval(), tokenizer, {}), form, dtype, widen)
        tokenizer.save(folder / "tokenizer.model")
        return shape, folder

    return make


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("form", "widen"), [("compact", "auto"), ("deepseek-v3", "auto"), ("deepseek-v3", "off")])
@pytest.mark.parametrize("shape", [NARROW, EVEN, SPLIT], ids=["tiny", "even", "split"])
def test_export_import_export_gives_the_same_bytes(exported, tmp_path, tokenizer, shape, form, dtype, widen):
    shape, first = exported(shape, form, DTYPES[dtype], widen)
    imported = import_model(first)
    assert (imported.config, imported.tokenizer.serialized) == (shape, tokenizer.serialized)
    assert imported.record["changes"] == []
    assert {weight.dtype for name, weight in imported.weights.items() if "balance_bias" in name} == {torch.float32}
    (second := tmp_path / "second").mkdir()
    write_model(second, Bundle(model_of(imported), imported.tokenizer, {}), form, DTYPES[dtype], widen)
    names = {file.name for file in first.iterdir()} - {"tokenizer.model"}
    assert {name: sha256_of(second / name) for name in names} == {name: sha256_of(first / name) for name in names}


@pytest.mark.parametrize("form", get_args(HfFormat))
@torch.no_grad()
def test_what_transformers_trained_further_and_saved_in_several_files_computes_the_same(exported, tmp_path, form):
    shape, folder = exported(EVEN, form)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    (folder / "tokenizer.model").rename(tmp_path / "saved" / "tokenizer.model")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    imported = import_model(tmp_path / "saved")
    if form == "compact":
        assert (imported.config, imported.record["changes"]) == (shape, [])
    else:  # where the export left zeros there are none
        assert (imported.config.moe_every, imported.config.n_dense_first) == (1, 3)
        assert imported.config.kv_lora_rank == 512
        assert "attention stays wide" in imported.record["changes"][0]
        assert "stay Mixtures of Experts" in imported.record["changes"][1]
    tokens = torch.randint(shape.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model_of(imported)(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_tensor_in_two_files_is_refused(exported):
    _, folder = exported(NARROW, "compact")
    weights = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, folder / "older.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is in .*older.safetensors and in another file"):
        import_model(folder)
