"""A run is the same run however often it was stopped, and refuses to become another one."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanollm.bundle import load_bundle
from nanollm.cli import main
from nanollm.config import parse_options, read_mapping, to_yaml
from nanollm.data.batches import TextShards
from nanollm.data.shards import Shards
from nanollm.durable import lock_folder
from nanollm.model import int4
from nanollm.stages import preprocess, pretrain
from nanollm.stages.pretrain import Config
from nanollm.train.checkpoint import checkpoints, read_weights
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.step import train_step
from tests.stages.conftest import FILES_OF_A_RUN, MODEL, interrupted, told, weights_of


def launch(config: Config, folder: Path) -> subprocess.Popen[str]:
    """The same run as a user starts it: in a process of its own, from a YAML file."""
    file = folder / f"{config.out.name}.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "nanollm", "pretrain", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_run_leaves_config_metrics_checkpoints_and_a_bundle_that_speaks(run_config, tokenizer):
    c = run_config()
    bundle = pretrain.run(c)
    assert bundle == c.out / "bundle"
    assert {path.name for path in c.out.iterdir()} == FILES_OF_A_RUN
    lines = read_metrics(c.out)
    assert [line["step"] for line in lines] == list(range(13))
    assert lines[-1]["val_bpb"] < lines[0]["val_bpb"]
    assert [len(checkpoints(c.out / "checkpoints"))] == [c.train.keep_last]
    loaded = load_bundle(bundle)
    assert loaded.model.config == c.model
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.provenance["tokens_seen"] == 12 * 4 * 32


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process at once and knows no SIGTERM")
def test_stopped_by_a_signal_it_saves_and_the_same_command_ends_with_the_same_bits(run_config, tmp_path):
    expected, stopped = run_config(steps=100, out="expected"), run_config(steps=100, out="stopped")
    reference = launch(expected, tmp_path)
    process = launch(stopped, tmp_path)
    wait_for_step(stopped.out, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 143, errors
    assert "SIGTERM: saving after this step" in errors
    assert "the same command goes on from here" in errors
    saved = int(checkpoints(stopped.out / "checkpoints")[0].name.removeprefix("step-"))
    assert 5 <= saved < 100
    process = launch(stopped, tmp_path)
    assert process.communicate(timeout=240)[0].strip() == str(stopped.out / "bundle")
    assert reference.communicate(timeout=240)[0].strip() == str(expected.out / "bundle")
    assert weights_of(stopped.out) == weights_of(expected.out)
    assert told(stopped.out) == told(expected.out)


def test_stopped_where_int4_begins_it_ends_with_the_same_bits_which_int4_keeps(run_config, monkeypatch, capsys):
    shape = dataclasses.replace(MODEL, q_lora_rank=32)
    expected, stopped = (run_config(model=shape, out=out) for out in ("expected", "stopped"))
    expected, stopped = (
        dataclasses.replace(c, train=dataclasses.replace(c.train, qat_fraction=0.5)) for c in (expected, stopped)
    )
    assert stopped.train.int4_from == 6
    pretrain.run(expected)
    with interrupted(monkeypatch, pretrain, "train_step", after=6):
        pretrain.run(stopped)
    bundle = pretrain.run(stopped)
    assert weights_of(stopped.out) == weights_of(expected.out)
    assert told(stopped.out) == told(expected.out)
    assert int4.was_trained_for_it(load_file(bundle / "model.safetensors"))
    assert not int4.was_trained_for_it(read_weights(checkpoints(stopped.out / "checkpoints")[0]))
    for dtype, says in (("q4_0", False), ("q8_0", True)):
        assert main(["export", str(bundle), "--format", "gguf", "--dtype", dtype, "--force"]) == 0
        assert ("trained for int4: --dtype q4_0 keeps its weights" in capsys.readouterr().err) == says
    with pytest.raises(ValueError, match="int4 needs widths that 32 divides, but q_lora_rank is 16"):
        dataclasses.replace(expected, model=MODEL)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            complete = (run / "metrics.jsonl").read_text().splitlines()[:-1]
            if len(complete) > step:
                return
        time.sleep(0.01)
    raise TimeoutError(f"{run} did not reach step {step}")


def test_a_finished_run_stays_as_it_is_and_is_not_continued_as_another_one(run_config, prepared, token_files, capsys):
    c = run_config(steps=4)
    pretrain.run(c)
    before = weights_of(c.out), told(c.out)
    file = token_files.parent / "000.txt"
    for change, key in [
        ({"seed": 1}, "seed = 0, this run has 1"),
        ({"model": dataclasses.replace(c.model, d_ff=96)}, "model.d_ff = 64, this run has 96"),
        ({"data": prepared("text", file, val_input=[file])}, "inputs.data = "),
        ({"optim": OptimConfig(name="adamw", warmup_steps=2)}, "optim.name = muon, this run has adamw"),
    ]:
        with pytest.raises(ValueError, match=key) as error:
            pretrain.run(dataclasses.replace(c, **change))
        assert "choose another --out" in str(error.value)
    with lock_folder(c.out), pytest.raises(ValueError, match="is in use by another process"):
        pretrain.run(c)
    kept = {path: path.read_bytes() for path in c.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"has done 4 steps, more than --train.steps 3; give at least 4, or choose"):
        pretrain.run(run_config(steps=3))
    assert {path: path.read_bytes() for path in c.out.rglob("*") if path.is_file()} == kept
    pretrain.run(c)
    assert (weights_of(c.out), told(c.out)) == before
    pretrain.run(dataclasses.replace(c, optim=OptimConfig(warmup_steps=2, lr=1e-4)))
    assert f"goes on with optim.lr = 0.0001 instead of {c.optim.lr}" in capsys.readouterr().err
    assert read_mapping(c.out / "config.yaml")["optim"]["lr"] == 1e-4


def test_a_tokenizer_too_large_for_the_model_is_refused(run_config):
    c = run_config()
    with pytest.raises(ValueError, match=r"the tokenizer has 600 pieces, model\.vocab_size is 500"):
        pretrain.run(dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=500)))
    assert not c.out.exists()


def test_token_files_of_another_tokenizer_are_refused(run_config, tmp_path):
    from nanollm.text.train_tokenizer import train

    other = tmp_path / "other.model"
    train(["some other text entirely, with other words " * 50], other, vocab_size=300)
    with pytest.raises(ValueError, match="was written with tokenizer"):
        pretrain.run(run_config(tokenizer_path=other))


def test_a_corpus_smaller_than_one_window_is_refused(run_config):
    c = run_config()
    longer = dataclasses.replace(c.model, context_length=100_000)
    with pytest.raises(ValueError, match="one window needs context_length"):
        pretrain.run(dataclasses.replace(c, model=longer))
    assert not c.out.exists()


def test_a_plan_says_what_would_happen_and_does_nothing(run_config):
    c = run_config()
    assert "12 steps x 4 x 32 = 1,536 tokens, learning rate" in pretrain.plan(c)
    assert not c.out.exists()


def test_a_run_that_explodes_stops_and_says_so(run_config):
    c = run_config(steps=60, optim=OptimConfig(name="adamw", lr=1e30, warmup_steps=0, weight_decay=0))
    with pytest.raises(ValueError, match=r"were all skipped.* and the run stopped; .* lower optim\.lr"):
        pretrain.run(c)
    assert all(torch.isfinite(t).all() for p in checkpoints(c.out / "checkpoints") for t in tensors_of(p))


def tensors_of(checkpoint: Path) -> list[torch.Tensor]:
    return list(load_file(checkpoint / "weights.safetensors").values())


def test_the_settings_of_a_run_are_saved_resolved(run_config):
    c = run_config(steps=1, device="auto", dtype="auto")
    pretrain.run(c)
    saved = read_mapping(c.out / "config.yaml")
    assert saved["device"] in ("cpu", "cuda", "mps")
    assert saved["dtype"] in ("bfloat16", "float16", "float32")


def test_without_validation_text_a_run_trains_and_says_so(run_config, prepared, token_files, capsys):
    c = run_config(steps=2, data=prepared("text", *(token_files.parent / f"00{n}.txt" for n in range(3))))
    assert pretrain.run(c)
    assert "has no validation text" in capsys.readouterr().err
    assert not any("val_bpb" in line for line in read_metrics(c.out))


def test_conversations_are_not_pretrained_on(run_config, prepared, tmp_path):
    line = (
        '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox, of course."}]}\n'
    )
    (tmp_path / "chats.jsonl").write_text(line * 50)
    with pytest.raises(ValueError, match="holds conversations"):
        pretrain.run(run_config(data=prepared("chat", tmp_path / "chats.jsonl")))


def test_a_changed_byte_of_the_token_files_is_found_before_the_first_step(
    run_config, tokenizer_path, token_files, tmp_path
):
    data = Path(shutil.copytree(token_files, tmp_path / "data"))
    content = bytearray((data / "train-00000.npy").read_bytes())
    content[-1] ^= 1
    (data / "train-00000.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.npy has sha256"):
        pretrain.run(run_config(data=data))


def test_sample_prompts_come_from_the_validation_text_and_are_saved_as_settings(run_config, token_files, tokenizer):
    c = run_config(steps=2, sample_prompts=["auto"])
    pretrain.run(c)
    prompts = read_mapping(c.out / "config.yaml")["sample_prompts"]
    val = Shards.open(token_files, "val", tokenizer_fingerprint=None)
    text = tokenizer.decode(val.read(0, val.tokens_total))
    assert len(set(prompts)) == 3
    assert all(prompt in text and len(prompt.split()) == 4 for prompt in prompts)
    assert [len(line["samples"]) for line in read_metrics(c.out) if "samples" in line] == [3, 3]


@pytest.fixture
def two_folders(token_files, prepared, tmp_path):
    """The story's folder, and another of a hundred short documents about numbers, a tenth of them held out."""
    lines = [json.dumps({"text": " ".join(f"{n} and {k} is {n + k}." for k in range(9))}) for n in range(100)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    return str(token_files), str(prepared("text", tmp_path / "sums.jsonl", val_fraction=0.1))


@pytest.mark.parametrize("documents", ["across", "apart"])
def test_a_mixture_stopped_before_and_within_its_last_stage_ends_with_the_same_bits(run_config, two_folders, documents):
    story, sums = two_folders
    mixed = {"data": {story: 0.75, sums: 0.25}, "anneal": {0.5: {sums: 1.0}}, "documents": documents}
    mixed["optim"] = OptimConfig(warmup_steps=2, final_lr_fraction=1.0)
    whole = pretrain.run(run_config(out="whole", **mixed)).parent
    c = run_config(out="parts", **mixed)
    for stop in (4, 8):  # the last stage begins with step 6
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain, "train_step", stopping_at(stop))
            with pytest.raises(KeyboardInterrupt):
                pretrain.run(c)
    pretrain.run(c)
    assert weights_of(c.out) == weights_of(whole)
    assert told(c.out)[-1] == told(whole)[-1]
    assert read_mapping(c.out / "config.yaml")["anneal"] == {"0.5": {sums: 1.0}}


def stopping_at(stop: int):
    def step(state, *others):
        if state.step == stop:
            raise KeyboardInterrupt
        return train_step(state, *others)

    return step


def test_of_a_mixture_each_folder_is_measured_and_all_together(run_config, two_folders):
    story, sums = two_folders
    c = run_config(steps=2, data={story: 1.0}, anneal={0.5: {sums: 2.0}}, validation_windows=0)
    for folder, line in zip(c.folders, pretrain.plan(c).splitlines()[1:], strict=True):
        rows = len(TextShards(Shards.open(Path(folder), tokenizer_fingerprint=None), 32))
        assert line == f"{folder}: 50.0% of the rows seen, {4 / rows:.2f} epochs of its {rows:,}"
    pretrain.run(c)
    last = read_metrics(c.out)[-1]
    own = [last[f"val_bpb/{folder}"] for folder in two_folders]
    assert min(own) < last["val_bpb"] < max(own)


def test_weights_and_stages_are_fixed_and_the_length_of_a_run_with_stages_too(run_config, two_folders):
    story, sums = two_folders
    mixed = {"data": {story: 0.75, sums: 0.25}, "anneal": {0.5: {sums: 1}}}
    pretrain.run(run_config(steps=2, **mixed))
    for change, key in [
        ({"data": {story: 0.5, sums: 0.5}}, "data"),
        ({"anneal": {0.6: {sums: 1}}}, "anneal.0.5"),
        ({"anneal": {}}, "anneal"),
        ({"steps": 4}, "train.steps = 2, this run has 4"),
        ({"documents": "apart"}, "inputs.documents = None, this run has apart"),
    ]:
        with pytest.raises(ValueError, match=key) as error:
            pretrain.run(run_config(**{"steps": 2} | mixed | change))
        assert "choose another --out" in str(error.value)


def test_a_run_of_one_folder_from_before_there_were_mixtures_resumes(run_config, token_files, tmp_path):
    c = run_config(steps=2)
    pretrain.run(c)
    settings = read_mapping(c.out / "config.yaml")
    assert settings.pop("anneal") == {} and settings.pop("documents") == "across"
    (c.out / "config.yaml").write_text(to_yaml(settings))
    moved = shutil.copytree(token_files, tmp_path / "moved")
    pretrain.run(run_config(steps=4, data=moved))
    with pytest.raises(ValueError, match=r"inputs\.documents = None, this run has apart"):
        pretrain.run(run_config(steps=4, documents="apart"))


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-0.5", "soon", "nan"])
def test_stages_begin_within_the_run(run_config, fraction):
    with pytest.raises(ValueError, match=f"anneal: expected fractions of the run above 0 and below 1, got {fraction}"):
        run_config(anneal={fraction: {"a": 1}})


def test_each_stage_begins_once(run_config):
    with pytest.raises(ValueError, match=r"anneal: expected each fraction once, got 0\.8, 0\.80"):
        run_config(anneal={"0.8": {"a": 1}, "0.80": {"b": 1}})


def test_a_mixture_of_no_weight_or_of_another_tokenizer_is_refused(run_config, two_folders, tmp_path):
    for weight in (0, -1):
        with pytest.raises(ValueError, match=rf"anneal\.0\.8: the weight of a must be above 0, got {weight}"):
            run_config(anneal={0.8: {"a": weight}})
        with pytest.raises(ValueError, match=f"data: the weight of a must be above 0, got {weight}"):
            run_config(data={"a": weight})
    from nanollm.text.train_tokenizer import train

    train(["some other text entirely, with other words " * 50], tmp_path / "other.model", vocab_size=300)
    (tmp_path / "mine.txt").write_text("some other words entirely " * 50)
    other = preprocess.Config(
        kind="text", input=[tmp_path / "mine.txt"], tokenizer_path=tmp_path / "other.model", save_dir=tmp_path / "other"
    )
    foreign = preprocess.run(other)
    with pytest.raises(ValueError, match=f"{foreign} was written with tokenizer"):
        pretrain.run(run_config(data={two_folders[0]: 1, str(foreign): 1}))


def test_the_words_of_a_mixture_are_read_as_they_are_meant(run_config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run_config()))
    words = ["--config", str(file), "--data", "{a: 0.7, b: 3e-1}", "--anneal", "{0.9: {b: 1}, 0.5: {a: 1, b: 4}}"]
    c, _ = parse_options("pretrain", pretrain, words)
    assert c.weights == {0.0: {"a": 0.7, "b": 0.3}, 0.5: {"a": 1.0, "b": 4.0}, 0.9: {"b": 1.0}}
    file.write_text(to_yaml(c))
    assert parse_options("pretrain", pretrain, words[:2])[0] == c


def test_a_fast_start_and_the_prompts_of_its_samples_are_the_same_after_a_stop(run_config):
    constant = OptimConfig(warmup_steps=2, final_lr_fraction=1.0)
    same = {"start": "fast", "optim": constant, "sample_prompts": ["auto"]}
    whole = pretrain.run(run_config(out="whole", steps=8, **same)).parent
    pretrain.run(run_config(out="parts", steps=5, **same))
    bundle = pretrain.run(run_config(out="parts", steps=8, **same))
    assert weights_of(bundle.parent) == weights_of(whole)
    assert told(bundle.parent)[-1] == told(whole)[-1]
    rows = load_file(bundle / "model.safetensors")["trunk.embed.weight"]
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(len(rows)), rtol=1e-3, atol=0)


def test_without_sample_prompts_nothing_is_sampled(run_config):
    assert run_config(sample_prompts=["none"]).sample_prompts == []
    c = run_config(steps=2, sample_prompts=[])
    pretrain.run(c)
    assert not any("samples" in line for line in read_metrics(c.out))


def test_a_context_without_room_for_a_prompt_of_the_text_gives_fewer(run_config, tokenizer, token_files):
    c = run_config(sample_prompts=["auto"])
    shards = Shards.open(token_files, "val", tokenizer_fingerprint=None)
    narrow = dataclasses.replace(c, model=dataclasses.replace(c.model, context_length=2))
    splits = {"here": TextShards(shards, 2)}
    assert pretrain.sample_prompts(narrow, tokenizer, splits) == []
    with pytest.raises(ValueError, match="sample prompt 'Once upon a time' does not fit the context of 2 tokens"):
        pretrain.sample_prompts(dataclasses.replace(narrow, sample_prompts=["Once upon a time"]), tokenizer, splits)


def test_a_run_cannot_be_written_below_a_file(run_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .* choose another --out"):
        pretrain.run(run_config(out="file/run"))
