"""What a model costs, in numbers that other tests hold to the model itself."""

import json

import pytest

from nanollm.model.lora import LoraConfig
from nanollm.stages.info import Config, run


def facts(name, **settings):
    return json.loads(run(Config(model=name, json=True, **settings)))


def test_nano_327m_has_its_stated_size_and_cache():
    known = facts("nano-327m")
    assert known["parameters"]["total"] == 327_007_232
    assert known["cache"]["numbers_per_token_and_block"] == 320
    assert known["cache"]["bytes_per_token"] == 12_800
    assert known["cache"]["bytes_per_token_if_keys_and_values_were_kept"] == 122_880
    assert known["flops_per_token"]["training_at_full_context"] == pytest.approx(1.966e9, rel=1e-3)


def test_memory_grows_with_the_micro_batch_and_shrinks_with_the_type():
    small, large = (facts("nano-5m", micro_batch_size=n)["training_step"]["bytes"] for n in (1, 4))
    assert large["activations"] == 4 * small["activations"]
    assert large["weights"] == small["weights"]
    assert facts("nano-5m", dtype="float32")["training_step"]["bytes"]["activations"] > large["activations"]


def test_recomputation_keeps_a_fraction_of_the_activations_and_nothing_else_changes():
    plain, small = (facts("nano-327m", recompute=flag)["training_step"]["bytes"] for flag in (False, True))
    assert small["activations"] < plain["activations"] / 5
    assert small["total"] < 0.6 * plain["total"]
    assert {name: small[name] for name in ("weights", "optimizer", "logits")} == {
        name: plain[name] for name in ("weights", "optimizer", "logits")
    }


def test_an_adapter_takes_a_fraction_of_what_training_takes():
    full, lora = facts("nano-327m"), facts("nano-327m", lora=LoraConfig(rank=16))
    parts = lora["training_step"]["bytes"]
    assert parts["activations"] == full["training_step"]["bytes"]["activations"]
    assert sum(parts[name] for name in ("weights", "optimizer", "gradients", "sums")) < 6 * 327_007_232
    assert "with Muon, LoRA of rank 16 (weights" in run(Config(model="nano-327m", lora=LoraConfig(rank=16)))


def test_a_mistake_in_the_file_of_a_model_is_told_in_the_words_of_an_option(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, said in (
        ("d_modle: 3", "unknown option model.d_modle; did you mean"),
        ("d_ff: wide", "model.d_ff: expected int"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            run(Config(model=str(file)))


def test_the_table_is_for_people():
    text = run(Config(model="nano-327m"))
    assert "327,007,232 in all, 264,781,568 active per token" in text
