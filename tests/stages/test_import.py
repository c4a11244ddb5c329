"""A folder of others becomes a bundle that can be taught, or one line says why not."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollm import cli
from nanollm.bundle import Bundle, load_bundle
from nanollm.durable import sha256_of, write_json
from nanollm.export.hf import write_model
from nanollm.stages import generate, sft
from nanollm.stages.import_ import Config, run
from tests.export.foreign import PIECES, save_foreign
from tests.stages.test_sft import prepare

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model of others, in one file of weights."""
    folder = tmp_path_factory.mktemp("foreign")
    save_foreign(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save_foreign(folder, shard_size="60KB")
    return folder


@pytest.fixture
def complaint(tmp_path, capsys):
    """The one line that importing a folder gives, after which nothing is written."""

    def make(folder, out="bundle", *words):
        capsys.readouterr()  # what was said before
        assert cli.main(["import", str(folder), "--out", str(tmp_path / out), *words]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert not (tmp_path / "bundle").exists()
        return said.err.removeprefix("nanollm import: ").strip().replace(str(folder), "DIR")

    return make


# --- a bundle ---


def test_the_command_makes_a_bundle_and_says_and_keeps_what_it_changed(foreign, tmp_path, capsys):
    assert cli.main(["import", str(foreign), "--out", str(tmp_path / "bundle")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'bundle'}\n"
    bundle = load_bundle(tmp_path / "bundle")
    (imported,) = bundle.provenance["imports"]
    assert bundle.is_base
    assert (imported["folder"], imported["format"]) == (foreign.name, "deepseek_v3")
    assert imported["files"] == {
        name: sha256_of(foreign / name) for name in ("config.json", "tokenizer.model", WEIGHTS)
    }
    assert imported["changes"] == said.err.splitlines()[:-1]
    assert len(imported["changes"]) == 6
    assert bundle.tokenizer.vocab_size == bundle.model.config.vocab_size == PIECES + 5


def test_an_export_of_ours_comes_back_with_its_history(bundle, tmp_path):
    export, exported = tmp_path / "export", load_bundle(bundle)
    history = {"made_by": "nanollm sft", "parent": {"made_by": "nanollm pretrain"}}
    export.mkdir()
    write_model(export, exported, "deepseek-v3", torch.float32)
    exported.tokenizer.save(export / "tokenizer.model")
    write_json(export / "provenance.json", history)
    back = load_bundle(run(Config(folder=export, out=tmp_path / "back")))
    assert not back.is_base
    assert {key: back.provenance[key] for key in history} == history
    assert back.model.config == exported.model.config
    assert back.tokenizer.fingerprint == exported.tokenizer.fingerprint
    again = load_bundle(run(Config(folder=exported_as(back, tmp_path / "again"), out=tmp_path / "twice")))
    assert [step["folder"] for step in again.provenance["imports"]] == ["export", "again"]


def exported_as(bundle: Bundle, folder):
    folder.mkdir()
    write_model(folder, bundle, "compact", torch.float32)
    bundle.tokenizer.save(folder / "tokenizer.model")
    write_json(folder / "provenance.json", bundle.provenance)
    return folder


def test_what_others_trained_continues_texts_and_can_be_taught_to_reply(foreign, tmp_path):
    bundle = run(Config(folder=foreign, out=tmp_path / "bundle"))
    assert generate.run(generate.Config(bundle=bundle, prompt=["The sea"], max_tokens=4)).startswith("The sea")
    data = prepare(bundle / "tokenizer.model", tmp_path / "chats", [("Who?", "A fox.")] * 8, val_fraction=0.0)
    c = sft.Config(
        bundle=bundle,
        data=data,
        out=tmp_path / "run",
        train=sft.ChatTrainConfig(steps=40, batch_size=8, micro_batch_size=8),
        optim=sft.OptimConfig(lr=1e-2, warmup_steps=2),
        dtype="float32",
        sample_prompts=[],
    )
    taught = sft.run(c)
    assert not load_bundle(taught).is_base
    asked = generate.Config(bundle=taught, prompt=["Who?"], chat=True, temperature=0, dtype="float32")
    assert generate.run(asked) == "A fox."


# --- where it is written ---


def test_nothing_that_lies_at_out_is_lost_unasked(foreign, tmp_path, complaint):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "poem.txt").write_text("o sea")
    assert "notes holds poem.txt, which is not of a bundle; choose another --out" in complaint(
        foreign, "notes", "--force"
    )
    assert "poem.txt is a file; choose another --out" in complaint(foreign, "notes/poem.txt")
    assert "holds the model that is imported" in complaint(shutil.copytree(foreign, tmp_path / "in" / "dir"), "in")
    made = run(Config(folder=foreign, out=tmp_path / "made"))
    assert "made is a bundle already; choose another --out, or replace it with --force" in complaint(foreign, "made")
    (made / "mine.txt").write_text("")
    assert "made holds mine.txt, which is not of a bundle" in complaint(foreign, "made", "--force")
    (made / "mine.txt").unlink()
    run(Config(folder=foreign, out=made, force=True))
    assert load_bundle(made).is_base


# --- what is refused ---


def test_a_folder_that_is_no_model_is_named(bundle, tmp_path, complaint):
    assert complaint(tmp_path / "nowhere").startswith("DIR is not a model to import (no folder); expected a folder")
    (tmp_path / "empty").mkdir()
    assert "(there is no config.json in it); expected a folder with config.json" in complaint(tmp_path / "empty")
    (tmp_path / "model.gguf").write_text("")
    assert "(it is a file)" in complaint(tmp_path / "model.gguf")
    assert complaint(bundle) == "DIR is a bundle already; use it as it is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected deepseek_v3 or glm4_moe_lite, got llama"),
        ({"model_type": None}, "model_type: expected deepseek_v3 or glm4_moe_lite, got None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "DIR is quantised (quantization_config in config.json)"),
        ({"q_lora_rank": None}, "q_lora_rank must be a whole number, got None"),
        ({"kv_lora_rank": "20"}, "kv_lora_rank must be a whole number, got '20'"),
        ({"n_group": 5, "topk_group": 2}, "topk_group must be n_group (5: a choice among all experts), got 2"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid', got 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc', got 'greedy'"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}, "rope_parameters": None}, "must be default, got yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "must be default, got yarn"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "factor must be 1, got 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"rope_parameters": "yarn"}, "config.json holds a value of the wrong kind"),
        ({"mlp_layer_types": 3}, "config.json holds a value of the wrong kind"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "config.json holds a value of the wrong kind"),
        ({"rope_interleave": False}, "rope_interleave must be True, got False"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be num_attention_heads (3), got 1"),
        ({"n_shared_experts": 0}, "n_shared_experts must be at least 1, got 0"),
        ({"n_shared_experts": None}, "n_shared_experts must be a whole number, got None"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
        ({"num_experts_per_tok": 6}, "at most model.n_routed_experts (5), got 6"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "Mixtures of Experts in blocks [1, 3] of 3"),
        ({"first_k_dense_replace": 3}, "Mixtures of Experts in blocks [] of 3"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, but the weights have 3 layers"),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "knows nothing of 29 tensors"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, but the longest side of a tensor is 480"),
        ({"moe_intermediate_size": 10**12}, "moe_intermediate_size is 1000000000000, but the longest side"),
        ({"n_routed_experts": 400}, "model.layers.1.mlp.gate.weight has the shape [5, 40], config.json asks for [400"),
        ({"n_routed_experts": -1}, "n_routed_experts must be at least 1, got -1"),
        ({"hidden_size": 48}, "model.embed_tokens.weight has the shape [480, 40], config.json asks for [480, 48]"),
        ({"nanollm": {"n_blocks": 3, "depth": 3}}, "nanollm does not describe the shape of a bundle"),
    ],
)
def test_a_config_that_we_cannot_express_or_that_lies_is_refused_by_name(foreign, tmp_path, complaint, words, message):
    folder = shutil.copytree(foreign, tmp_path / "model")
    write_json(folder / "config.json", json.loads((folder / "config.json").read_bytes()) | words)
    assert message in complaint(folder)


def test_a_vocabulary_that_token_files_cannot_hold_is_refused(tmp_path, complaint):
    save_foreign(tmp_path / "large", vocab_size=65_537, hidden_size=8)
    assert "model.vocab_size must be at most 65,536 (token files hold uint16), got 65537" in complaint(
        tmp_path / "large"
    )


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused_unread(foreign, tmp_path, complaint, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(foreign, tmp_path / "model")
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    said = complaint(folder)
    assert f"DIR has its weights in {name}, a pickle, which can run any code when it is read" in said
    (folder / name).rename(folder / WEIGHTS)
    assert "is not a whole safetensors file" in complaint(folder)
    assert not (tmp_path / "exploded").exists()


def cut(folder, name, size):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:size])


def without_index_entry(folder, name="model.norm.weight"):
    index = json.loads((folder / INDEX).read_bytes())
    del index["weight_map"][name]
    write_json(folder / INDEX, index)


def index_names(folder, file):
    index = json.loads((folder / INDEX).read_bytes())
    index["weight_map"]["model.norm.weight"] = file
    write_json(folder / INDEX, index)


def change(folder, name, tensor):
    """Replace a tensor, or take it out (None)."""
    weights = load_file(folder / WEIGHTS)
    weights = {key: value for key, value in (weights | {name: tensor}).items() if value is not None}
    save_file(weights, folder / WEIGHTS)


def lie_beside_an_empty_tensor(folder):
    """A file of some bytes can hold a tensor with a side of any length, if another side is 0."""
    change(folder, "model.extra", torch.empty(0, 10**15))
    words = json.loads((folder / "config.json").read_bytes())
    write_json(folder / "config.json", words | {"moe_intermediate_size": 10**12})


GATE = "model.layers.2.mlp.gate.weight"


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("foreign", lambda folder: (folder / WEIGHTS).unlink(), f"DIR has no weights; expected {WEIGHTS} or {INDEX}"),
        ("foreign", lambda folder: cut(folder, WEIGHTS, 0), f"{WEIGHTS} is not a whole safetensors file"),
        ("foreign", lambda folder: cut(folder, WEIGHTS, 5), f"{WEIGHTS} is not a whole safetensors file"),
        ("foreign", lambda folder: cut(folder, WEIGHTS, -1), f"{WEIGHTS} is not a whole safetensors file"),
        ("foreign", lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs"), "not a whole safetensors"),
        ("foreign", lambda folder: change(folder, GATE, None), f"the tensor {GATE} is missing"),
        ("foreign", lambda folder: change(folder, GATE, torch.ones(4, 40)), f"{GATE} has the shape [4, 40]"),
        ("foreign", lambda folder: change(folder, "model.extra", torch.ones(2)), "1 tensors, such as model.extra"),
        (
            "foreign",
            lambda folder: change(folder, GATE, torch.ones(5, 40).to(torch.float8_e4m3fn)),
            f"{GATE} must be float32, bfloat16 or float16, got float8_e4m3fn",
        ),
        ("foreign", lambda folder: change(folder, GATE, torch.ones(5, 40, dtype=torch.int64)), "got int64"),
        ("foreign", lie_beside_an_empty_tensor, "is 1000000000000, but the longest side of a tensor is 480"),
        ("sharded", lambda folder: min(folder.glob("*-00002-*")).unlink(), "is missing, model.safetensors.index.json"),
        ("sharded", lambda folder: cut(folder, min(folder.glob("*-00002-*")).name, -1), "is not a whole safetensors"),
        ("sharded", without_index_entry, "the tensor model.norm.weight is in DIR/model-0000"),
        ("sharded", lambda folder: index_names(folder, "../secret.safetensors"), "names '../secret.safetensors', exp"),
        ("sharded", lambda folder: index_names(folder, "model.bin"), "names 'model.bin', expected safetensors files"),
        ("sharded", lambda folder: index_names(folder, 7), "names 7, expected safetensors files of the same folder"),
        ("sharded", lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
        ("sharded", lambda folder: (folder / INDEX).write_text("[" * 100_000), f"{INDEX} is not valid JSON"),
        ("foreign", lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got list"),
        ("foreign", lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json is not valid JSON"),
        ("foreign", lambda folder: (folder / "tokenizer.model").unlink(), "DIR has no tokenizer.model, the Sentence"),
        ("foreign", lambda folder: cut(folder, "tokenizer.model", 99), "tokenizer.model is not a SentencePiece model"),
        (
            "foreign",
            lambda folder: (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": 1}}'),
            "added_tokens_decoder does not list tokens with their ids",
        ),
        (
            "foreign",
            lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": null}]}'),
            "added_tokens does not list tokens with their ids",
        ),
        ("foreign", lambda folder: (folder / "provenance.json").write_text("[]"), "must hold a JSON object, got list"),
    ],
)
def test_files_that_are_damaged_or_missing_are_named(request, tmp_path, complaint, kind, spoil, message):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    spoil(folder)
    assert message in complaint(folder)


def test_without_its_sentencepiece_model_a_tokenizer_is_refused_with_the_reason(foreign, tmp_path, complaint):
    folder = shutil.copytree(foreign, tmp_path / "model")
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    assert complaint(folder).endswith(
        "tokenizer.json alone does not do: only SentencePiece's own file tells how text is normalised"
    )
