"""A bundle becomes a folder for others, and a mistake costs one line and no file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle, save_bundle
from nanollm.export import engines
from nanollm.export.verify import Check
from nanollm.model.transformer import Transformer
from nanollm.stages.export import Config, plan, run
from tests.export.strings import TOKENIZER_FILES
from tests.stages.conftest import MODEL

ODD = replace(MODEL, kv_lora_rank=20)


@pytest.fixture
def complaint(bundle, tmp_path, capsys):
    """The one line that `nanollm export BUNDLE --out tmp_path/out ...` gives; exit code 2."""

    def said(*words, source=bundle):
        capsys.readouterr()
        code = cli.main(["export", str(source), "--out", str(tmp_path / "out"), *words])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), lines
        return lines[0]

    return said


@pytest.mark.parametrize(
    ("form", "own"),
    [
        ("compact", {"config.json", "model.safetensors"}),
        ("deepseek-v3", {"config.json", "model.safetensors"}),
        ("gguf", {"tiny-model-F32.gguf", "Modelfile"}),
    ],
)
def test_an_export_has_the_files_of_its_format(form, own, bundle, tmp_path):
    config = Config(bundle=bundle, format=form, out=tmp_path / "out", name="ada/tiny model")
    assert plan(config).startswith(f"{form}, f32, ")
    assert not (tmp_path / "out").exists()
    assert run(config) == tmp_path / "out"
    shared = {*TOKENIZER_FILES, "generation_config.json", "provenance.json", "README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == shared | own


def test_the_weights_keep_the_type_of_the_bundle_unless_another_is_asked_for(bundle, tmp_path):
    sizes = {}
    for dtype in ("auto", "f32", "bf16"):
        run(Config(bundle=bundle, dtype=dtype, out=tmp_path / dtype))
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["auto"] == sizes["f32"] > 1.8 * sizes["bf16"]


def test_the_folder_lies_beside_the_bundle_unless_it_is_given(bundle, tmp_path, monkeypatch):
    shutil.copytree(bundle, tmp_path / "run" / "bundle")
    monkeypatch.chdir(tmp_path / "run")
    assert (
        run(Config(bundle=Path("bundle"), format="deepseek-v3")).resolve()
        == tmp_path / "run" / "export" / "deepseek-v3"
    )


def test_no_path_of_this_machine_leaves(tmp_path, bundle):
    made, provenance = load_bundle(bundle), {"made_by": "a test", "config": {"data": {"/srv/ada/tokens": 1.0}}}
    save_bundle(tmp_path / "bundle", made.model.config, made.model.state_dict(), made.tokenizer, provenance)
    folder = run(Config(bundle=tmp_path / "bundle", out=tmp_path / "out"))
    for file in folder.iterdir():
        assert b"/srv/ada" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    assert json.loads((folder / "provenance.json").read_text("utf-8"))["config"] == {"data": {"tokens": 1.0}}


def test_a_folder_that_is_not_empty_is_replaced_by_force_only(bundle, tmp_path, complaint):
    run(Config(bundle=bundle, out=tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "out is an export already; choose another --out, or replace it with --force" in complaint()
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    run(Config(bundle=bundle, format="gguf", out=tmp_path / "out", force=True))
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", "llama-70b.gguf"])
def test_what_no_export_wrote_is_never_replaced(name, bundle, tmp_path, complaint):
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("years")
    assert f"out holds {name}, which is not of an export; choose another --out" in complaint("--force")
    shutil.rmtree(mine.parent)
    run(Config(bundle=bundle, out=mine.parent))
    mine.write_text("years")
    if name != "README.md":
        assert f"out holds {name}, which is not of an export; choose another --out" in complaint("--force")
    assert mine.read_text() == "years"


def test_another_bundle_is_never_replaced(bundle, tmp_path, complaint):
    shutil.copytree(bundle, tmp_path / "out")
    assert "out holds config.json, which is not of an export" in complaint("--force")
    assert load_bundle(tmp_path / "out")


def test_a_link_keeps_its_place(bundle, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for force in (False, True):
        run(Config(bundle=bundle, out=tmp_path / "link", force=force))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_folder_one_is_in_can_be_named_by_a_dot(bundle, tmp_path, monkeypatch):
    shutil.copytree(bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    assert (run(Config(bundle=Path(), out=Path("../out"))) / "config.json").is_file()


def test_the_bundle_is_never_replaced_by_its_export(bundle, tmp_path, capsys):
    shutil.copytree(bundle, tmp_path / "bundle")
    for out in (tmp_path / "bundle", tmp_path):
        assert cli.main(["export", str(tmp_path / "bundle"), "--out", str(out), "--force"]) == 2
        assert "holds the bundle; choose another --out" in capsys.readouterr().err


def test_bad_input_costs_one_line_and_no_file(bundle, tmp_path, complaint):
    torn = tmp_path / "torn"
    shutil.copytree(bundle, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for words in ([], ["--dry_run"]):
        assert "model.safetensors is not a whole safetensors file" in complaint(*words, source=torn)
    weights.unlink()
    assert "model.safetensors is missing" in complaint(source=torn)
    assert "is not a bundle (no such folder)" in complaint(source=tmp_path / "nothing")
    assert "is not a bundle (no config.json in it)" in complaint(source=bundle.parent)
    assert "--dtype q8_0 needs --format gguf or web; compact takes f32, bf16 or f16" in complaint("--dtype", "q8_0")
    assert "format: expected compact|deepseek-v3|gguf|web, got" in complaint("--format", "onnx")
    for words in (["--verify"], ["--format", "deepseek-v3"]):
        assert "--engine mlx needs --verify and --format deepseek-v3" in complaint("--engine", "mlx", *words)
    words = ["--format", "deepseek-v3", "--verify", "--engine", "vllm", "--engine_python", str(tmp_path / "none")]
    assert "none is no Python; --engine_python takes the folder of an environment that has vllm" in complaint(*words)
    odd = save_bundle(tmp_path / "odd", ODD, Transformer(ODD).init(0).state_dict(), load_bundle(bundle).tokenizer, {})
    for words in ([], ["--dry_run"]):
        assert "--widen off writes the model as it is" in complaint("--format", "deepseek-v3", *words, source=odd)
    assert not (tmp_path / "out").exists()


def test_an_export_that_exists_is_verified_as_it_stands(bundle, tmp_path, monkeypatch, complaint):
    held = Check("ids of texts", "equal", "equal", True)
    monkeypatch.setattr(engines, "compare_in_transformers", lambda *_: iter([held]))
    run(Config(bundle=bundle, out=tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert run(Config(bundle=bundle, out=tmp_path / "out", verify=True)) == tmp_path / "out"
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "is an export already; choose another --out" in complaint("--verify", "--dtype", "bf16")
    assert "--license must be one that the hub knows" in complaint("--license", "my own", "--push", "ada/x", "--force")


def test_what_does_not_hold_ends_in_exit_code_1(bundle, tmp_path, monkeypatch, capsys):
    failed = Check("greatest difference of a logit", "at most 0.0001", "1.5", False)
    monkeypatch.setattr(engines, "compare_in_transformers", lambda *_: iter([failed]))
    with pytest.raises(SystemExit, match="does not say what"):
        run(Config(bundle=bundle, out=tmp_path / "out", verify=True))
    assert "FAIL  greatest difference of a logit" in capsys.readouterr().err
