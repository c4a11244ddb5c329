"""An export becomes a bundle again, or one line says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollm import cli
from nanollm.bundle import load_bundle, save_bundle
from nanollm.durable import sha256_of, write_json
from nanollm.stages import export
from nanollm.stages.import_ import Config, run

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    """An export in one file of weights."""
    out = tmp_path_factory.mktemp("exported") / "export"
    return export.run(export.Config(bundle=bundle, format="deepseek-v3", out=out))


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


def test_an_export_comes_back_with_its_history(bundle, tmp_path, capsys):
    made, taught = load_bundle(bundle), tmp_path / "taught"
    history = {"made_by": "nanollm sft", "parent": {"made_by": "nanollm pretrain"}}
    save_bundle(taught, made.model.config, made.model.state_dict(), made.tokenizer, history)
    folder, back = taught, None
    for number in (1, 2):
        folder = export.run(export.Config(bundle=folder, out=tmp_path / f"export {number}"))
        assert cli.main(["import", str(folder), "--out", str(tmp_path / f"back {number}")]) == 0
        folder = Path(capsys.readouterr().out.strip())
    back = load_bundle(folder)
    assert not back.is_base
    assert {key: back.provenance[key] for key in history} == history
    assert back.model.config == made.model.config
    assert back.tokenizer.fingerprint == made.tokenizer.fingerprint
    first, second = back.provenance["imports"]
    assert (first["folder"], second["folder"], first["format"]) == ("export 1", "export 2", "compact")
    names = ("config.json", "tokenizer.model", WEIGHTS)
    assert second["files"] == {name: sha256_of(tmp_path / "export 2" / name) for name in names}


def test_without_a_history_it_is_a_base_model(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "provenance.json").unlink()
    assert load_bundle(run(Config(folder=folder, out=tmp_path / "back"))).is_base


def test_shards_without_an_index_names_of_a_compiled_model_and_rotary_buffers_are_read(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    (folder / WEIGHTS).unlink()
    for part, chosen in enumerate((names[::2], names[1::2])):
        shard = {f"_orig_mod.{name}": tensors[name] for name in chosen}
        shard[f"model.layers.{part}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(shard, folder / f"model-{part}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    back, plain = (
        run(Config(folder=folder, out=tmp_path / "back")),
        run(Config(folder=exported, out=tmp_path / "plain")),
    )
    assert sha256_of(back / WEIGHTS) == sha256_of(plain / WEIGHTS)


# --- where it is written ---


def test_nothing_that_lies_at_out_is_lost_unasked(exported, tmp_path, complaint):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "poem.txt").write_text("o sea")
    assert "notes holds poem.txt, which is not of a bundle; choose another --out" in complaint(
        exported, "notes", "--force"
    )
    assert "poem.txt is a file; choose another --out" in complaint(exported, "notes/poem.txt")
    assert "contains the model to import" in complaint(shutil.copytree(exported, tmp_path / "in" / "dir"), "in")
    made = run(Config(folder=exported, out=tmp_path / "made"))
    assert "made is a bundle already; choose another --out, or replace it with --force" in complaint(exported, "made")
    (made / "mine.txt").write_text("")
    assert "made holds mine.txt, which is not of a bundle" in complaint(exported, "made", "--force")
    (made / "mine.txt").unlink()
    run(Config(folder=exported, out=made, force=True))
    assert load_bundle(made).is_base


# --- what is refused ---


def test_a_folder_that_is_no_export_is_named(bundle, tmp_path, complaint):
    assert (
        complaint(tmp_path / "nowhere")
        == "DIR has no config.json; expected a folder that nanollm export wrote (no GGUF)"
    )
    assert complaint(bundle) == "DIR is a bundle already; use it as it is"
    (tmp_path / "others").mkdir()
    write_json(tmp_path / "others" / "config.json", {"model_type": "deepseek_v3"})
    assert "config.json is not of an export: it has no 'nanollm'; import reads those only" in complaint(
        tmp_path / "others"
    )


def shaped(**sizes):
    def spoil(folder):
        words = json.loads((folder / "config.json").read_bytes())
        write_json(folder / "config.json", words | {"nanollm": words["nanollm"] | sizes})

    return spoil


def worded(**words):
    return lambda folder: write_json(folder / "config.json", json.loads((folder / "config.json").read_bytes()) | words)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def changed(name, tensor):
    """Replace a tensor, or take it out (None)."""

    def spoil(folder):
        weights = load_file(folder / WEIGHTS) | {name: tensor}
        save_file({key: value for key, value in weights.items() if value is not None}, folder / WEIGHTS)

    return spoil


def lie_about_the_experts(folder):
    shaped(n_routed_experts=10**6)(folder)
    worded(n_routed_experts=10**6)(folder)


GATE = "model.layers.3.mlp.gate.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (worded(model_type="llama"), "config.json is not of an export"),
        (worded(num_hidden_layers=3), "num_hidden_layers"),
        (worded(hidden_size=float("nan")), "hidden_size"),
        (worded(vocab_size="480"), "vocab_size"),
        (worded(scoring_func="softmax"), "scoring_func must be 'sigmoid', as it was exported, got 'softmax'"),
        (worded(max_position_embeddings=4096), "max_position_embeddings must be 32, as it was exported, got 4096"),
        (worded(nanollm={"depth": 3}), "depth must be left out, got 3"),
        (worded(nanollm=[]), "DIR: "),
        (shaped(d_model="32"), "d_model must be int, got '32'"),
        (shaped(n_shared_experts=0), "n_shared_experts must be from 1 to 1,048,576, got 0"),
        (shaped(n_blocks=10**6), "n_blocks is 1000000, but the weights have 4 layers"),
        (shaped(n_routed_experts=10**6), "n_routed_experts must be 1000000, as it was exported, got 2"),
        (shaped(d_ff=48), "intermediate_size must be 48, as it was exported, got 64"),
        (lie_about_the_experts, f"{GATE} has the shape [2, 32], config.json asks for [1000000, 32]"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"DIR has no {WEIGHTS}; pickled weights (.bin, .pt) are not read"),
        (cut(WEIGHTS, 0), f"{WEIGHTS} is not a whole safetensors file"),
        (cut(WEIGHTS, -1), f"{WEIGHTS} is not a whole safetensors file"),
        (changed(GATE, None), f"the tensor {GATE} is missing"),
        (changed(GATE, torch.ones(4, 40)), f"{GATE} has the shape [4, 40]"),
        (
            changed(GATE, torch.ones(2, 32, dtype=torch.int64)),
            f"{GATE} must be float32, bfloat16 or float16, got torch",
        ),
        (changed("model.extra", torch.ones(2)), "1 tensors, such as model.extra"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json is not valid JSON"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "DIR has no tokenizer.model; copy that of the export"),
        (cut("tokenizer.model", 99), "tokenizer.model is not a SentencePiece model"),
        (lambda folder: (folder / "provenance.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda folder: (folder / "provenance.json").write_text('{"parent": 3}'), "parent must be a dict; delete it"),
    ],
)
def test_what_is_changed_damaged_or_missing_is_named(exported, tmp_path, complaint, spoil, message):
    folder = shutil.copytree(exported, tmp_path / "model")
    spoil(folder)
    assert message in complaint(folder)
