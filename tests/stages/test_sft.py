"""Fine-tuning goes on like pretraining does, and reads only what it can learn a reply from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.config import parse_options, read_mapping, to_yaml
from nanollm.data.batches import IGNORE
from nanollm.model import int4
from nanollm.model.lora import LoraConfig
from nanollm.stages import preprocess, sft
from nanollm.stages.sft import ChatTrainConfig, Config
from nanollm.text.train_tokenizer import train as train_tokenizer
from nanollm.train.checkpoint import checkpoints
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.world import World
from tests.conftest import STORY
from tests.stages.conftest import FILES_OF_A_RUN, MODEL, told, untrained, weights_of

SHAPE = dataclasses.replace(MODEL, context_length=64)


@pytest.fixture(scope="session")
def bundle(tokenizer, tmp_path_factory):
    """A model that has learned nothing yet."""
    return untrained(tmp_path_factory.mktemp("base") / "bundle", SHAPE, tokenizer)


def prepare(tokenizer_path: Path, folder: Path, talks: list[tuple[str, str]], val_fraction: float = 0.2) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in talks
    ]
    folder.mkdir()
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return preprocess.run(
        preprocess.Config(
            kind="chat",
            tokenizer_path=tokenizer_path,
            save_dir=folder / "tokens",
            input=[folder / "chats.jsonl"],
            val_fraction=val_fraction,
        )
    )


@pytest.fixture(scope="session")
def folders(tokenizer_path, tmp_path_factory):
    """Two folders of short conversations: 80 about numbers and 40 about the story."""
    home = tmp_path_factory.mktemp("chats")
    words = STORY.read_text("utf-8").split()
    numbers = [(f"What comes after {n}?", f"{n + 1}.") for n in range(80)]
    story = [(f"Go on: {' '.join(words[n : n + 4])}", " ".join(words[n + 4 : n + 9])) for n in range(40)]
    return [prepare(tokenizer_path, home / name, talks) for name, talks in (("numbers", numbers), ("story", story))]


@pytest.fixture
def run_config(bundle, folders, tmp_path):
    """run_config(out=..., steps=..., **fields of Config): a run of seconds in float32 on both folders."""

    def make(steps: int = 12, out: str = "run", **fields) -> Config:
        defaults = {
            "bundle": bundle,
            "data": {str(folders[0]): 0.7, str(folders[1]): 0.3},
            "out": tmp_path / out,
            "train": ChatTrainConfig(
                steps=steps, batch_size=10, micro_batch_size=2, log_every=1, validate_every=4, save_every=3
            ),
            "optim": OptimConfig(lr=1e-2, warmup_steps=2),
            "dtype": "float32",
            "sample_prompts": ["What comes after 3?"],
        }
        return Config(**defaults | fields)

    return make


# A run.


def test_a_run_leaves_a_bundle_that_knows_where_it_comes_from(run_config, bundle, folders, tokenizer):
    c = run_config()
    made = sft.run(c)
    assert {path.name for path in c.out.iterdir()} == FILES_OF_A_RUN
    lines = read_metrics(c.out)
    assert [line["step"] for line in lines] == list(range(13))
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert all(f"val_loss/{folder.as_posix()}" in lines[-1] for folder in folders)
    assert [len(line["samples"]) for line in (lines[0], lines[-1])] == [1, 1]
    assert len(checkpoints(c.out / "checkpoints")) == c.train.keep_last
    loaded, parent = load_bundle(made), load_bundle(bundle)
    assert (loaded.model.config, loaded.tokenizer.fingerprint) == (SHAPE, tokenizer.fingerprint)
    assert loaded.provenance["inputs"]["bundle"] == parent.provenance["files"]["model.safetensors"]
    assert loaded.provenance["parent"] == parent.provenance
    assert loaded.provenance["conversations_seen"] == 120
    assert loaded.provenance["inputs"]["data"].keys() == {folder.as_posix() for folder in folders}


def test_a_model_learns_to_give_the_one_reply_and_to_end_it(run_config, tokenizer_path, tmp_path):
    folder = prepare(tokenizer_path, tmp_path / "one", [("Who are you?", "A fox, of course.")] * 4, val_fraction=0.0)
    c = run_config(steps=60, data=folder, sample_prompts=["Who are you?"])
    sft.run(c)
    assert read_metrics(c.out)[-1]["samples"] == ["A fox, of course."]


def test_without_sample_prompts_the_shortest_questions_of_the_validation_are_asked(
    run_config, tokenizer_path, tmp_path
):
    said = [
        ("Why is the fox so red?", "It is."),
        ("Who?", "A fox."),
        ("Where to?", "Home."),
        ("And what now?", "Sleep."),
    ]
    trained = prepare(tokenizer_path, tmp_path / "trained", said * 2, val_fraction=0.0)
    c = run_config(steps=1, data=trained, sample_prompts=["auto"])
    made = load_bundle(sft.run(c))
    assert made.examples == ["Who?", "Where to?", "And what now?"]
    assert [len(line["samples"]) for line in read_metrics(c.out)] == [3, 3]
    assert sft.run(c) == c.out / "bundle"  # and the settings are the same again


def test_a_step_reads_the_sources_by_their_weights_and_trains_only_replies(run_config, tokenizer):
    c = run_config()
    _, splits, _ = sft._open(c, World())
    conversations = sft._mix(c, splits)
    drawn = [tokenizer.decode(each.ids.tolist()) for step in range(10) for each in conversations.draw(step, 10)]
    assert sum(text.startswith("What comes after") for text in drawn) == 70
    batches = conversations.micro_batches(0, 10, 2)
    said = [tokenizer.decode(batch.targets[batch.targets != IGNORE].tolist()) for batch in batches]
    assert "What" not in "".join(said)


def test_a_finished_run_started_again_changes_nothing(run_config):
    c = run_config(steps=4)
    sft.run(c)
    before = weights_of(c.out), told(c.out)
    sft.run(c)
    assert (weights_of(c.out), told(c.out)) == before


def test_one_folder_needs_no_weight_and_other_ways_to_write_it_are_the_same_run(run_config, folders):
    plain = run_config(data=folders[0])
    weighted = run_config(data={f"{folders[0]}/": 1})
    assert plain == weighted
    turned = run_config(data={str(folders[1]): 0.3, str(folders[0]): 0.7})
    assert list(turned.weights.items()) == list(run_config().weights.items())


def test_micro_batches_of_other_sizes_give_the_same_weights(run_config):
    weights = []
    for rows in (1, 3, 50):
        c = run_config(steps=3, out=f"rows-{rows}", optim=OptimConfig(lr=1e-3, warmup_steps=1, balance_rate=0.01))
        sft.run(dataclasses.replace(c, train=dataclasses.replace(c.train, micro_batch_size=rows)))
        weights.append(load_bundle(c.out / "bundle").model.state_dict())
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=2e-5)


def test_a_plan_says_what_would_be_seen_and_does_nothing(run_config, folders):
    c = run_config()
    lines = sft.plan(c).splitlines()
    assert "12 steps x 10 conversations" in lines[0]
    assert f"{folders[0].as_posix()}: 70.0% of the conversations seen, 1." in lines[1]
    assert "the first step fills" in lines[-1]
    assert not c.out.exists()


def test_conversations_that_must_be_cut_are_said_with_how(run_config, tokenizer_path, tmp_path):
    talks = [("Who?", "I do not know. " * 20)] * 3 + [("Who? " * 60, "Me.")] + [("Who?", "Me.")] * 6
    folder = prepare(tokenizer_path, tmp_path / "long", talks, val_fraction=0.0)
    said = sft.plan(run_config(data=folder))
    assert "4 are longer than the context of 64 tokens and are cut (cut question 25%, cut reply 75%)" in said


# Stopped and started again.


def test_killed_at_a_step_it_ends_with_the_same_bits(run_config, monkeypatch):
    expected, killed = run_config(steps=8, out="expected"), run_config(steps=8, out="killed")
    sft.run(expected)
    real, left = sft.train_step, [0]

    def dies(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sft, "train_step", dies)
    for left[0] in (1, 5):  # before the first checkpoint, and behind it
        with pytest.raises(KeyboardInterrupt):
            sft.run(killed)
        assert not (killed.out / "bundle").exists()
    monkeypatch.undo()
    sft.run(killed)
    assert weights_of(killed.out) == weights_of(expected.out)
    assert told(killed.out) == told(expected.out)


def test_a_run_is_not_continued_as_another_one(run_config, folders, tokenizer, tmp_path):
    c = run_config(steps=2)
    sft.run(c)
    other = untrained(tmp_path / "other", SHAPE, tokenizer, seed=1)
    for change, key in [
        ({"seed": 1}, "seed = 0, this run has 1"),
        ({"bundle": other}, r"inputs\.bundle = "),
        ({"data": {str(folders[0]): 0.5, str(folders[1]): 0.3}}, "data.* = 0.7, this run has 0.5"),
        ({"data": folders[0]}, "data.* this run has"),
        ({"train": dataclasses.replace(c.train, batch_size=8)}, r"train\.batch_size = 10, this run has 8"),
    ]:
        with pytest.raises(ValueError, match=key) as error:
            sft.run(dataclasses.replace(c, **change))
        assert "choose another --out" in str(error.value)
    assert sft.run(c)  # nothing was lost


def test_a_run_of_int4_from_its_first_step_leaves_what_int4_keeps(run_config, tokenizer, tmp_path):
    c = run_config(steps=2, bundle=untrained(tmp_path / "wide", dataclasses.replace(SHAPE, q_lora_rank=32), tokenizer))
    every = dataclasses.replace(c.train, qat_fraction=1.0)
    made = sft.run(dataclasses.replace(c, train=every))
    assert int4.was_trained_for_it(load_bundle(made).model.state_dict())
    with pytest.raises(ValueError, match="int4 needs widths that 32 divides, but q_lora_rank is 16"):
        sft.run(run_config(train=every, out="narrow"))
    with pytest.raises(ValueError, match=r"train.qat_fraction trains every weight, got lora\.rank 4"):
        dataclasses.replace(c, train=every, lora=LoraConfig(rank=4))
    with pytest.raises(ValueError, match=r"train\.qat_fraction must be between 0 and 1, got 1\.5"):
        dataclasses.replace(every, qat_fraction=1.5)


# What the user gets wrong.


def test_conversations_of_another_tokenizer_are_refused_with_the_command_to_type(run_config, bundle, tmp_path):
    other = tmp_path / "other.model"
    train_tokenizer(["some other text entirely, with other words " * 50], other, vocab_size=300)
    folder = prepare(other, tmp_path / "chats", [("Who?", "Me.")] * 3, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"was written with tokenizer \w{6}, .* has \w{6}; prepare it again") as error:
        sft.run(run_config(data=folder))
    assert f"--tokenizer_path {bundle / 'tokenizer.model'}" in str(error.value)


def test_a_rate_that_nobody_chose_is_refused_and_nothing_is_made(run_config):
    c = run_config(optim=OptimConfig(warmup_steps=2))
    with pytest.raises(ValueError, match=r"optim\.lr: expected a learning rate, got null; only pretrain chooses one"):
        sft.run(c)
    assert not c.out.exists()


def test_a_folder_that_is_not_there_is_refused_and_nothing_is_made(run_config, tmp_path):
    c = run_config(data=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is not a prepared folder"):
        sft.run(c)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sft.run(run_config(bundle=tmp_path / "no bundle"))
    assert not c.out.exists()


def test_a_sample_prompt_must_fit_the_context(run_config):
    with pytest.raises(ValueError, match=r"sample prompt 'why why .*' does not fit the context of 64 tokens"):
        sft.run(run_config(sample_prompts=["why " * 100]))


def test_without_a_validation_split_a_run_trains_and_says_so(run_config, tokenizer_path, tmp_path, capsys):
    folder = prepare(tokenizer_path, tmp_path / "chats", [("Who?", "Me.")] * 3, val_fraction=0.0)
    c = run_config(steps=2, data=folder)  # and an epoch of three is shorter than a step
    assert sft.run(c)
    assert "has no validation split: nothing will be measured on it" in capsys.readouterr().err
    assert not any("val_loss" in line for line in read_metrics(c.out))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "data/sni"], {"data/sni": 1.0}),
        (["--data", '{"data/sni": 0.7, "data/gsm8k": 0.3}'], {"data/gsm8k": 0.3, "data/sni": 0.7}),
        (["--data", "{data/sni: 7}"], {"data/sni": 7.0}),
        (["--config", "two.yaml"], {"data/gsm8k": 1.0, "data/sni": 3.0}),
        (["--config", "two.yaml", "--data", "data/own"], {"data/own": 1.0}),
    ],
)
def test_data_is_typed_as_a_folder_or_as_folders_with_weights(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("data:\n  data/sni: 3\n  data/gsm8k: 1\n")
    c, _ = parse_options("sft", sft, [*words, "--bundle", "b", "--out", "o", "--train.steps", "1"])
    assert c.weights == expected
    assert list(c.weights) == list(expected)
    Path("again.yaml").write_text(to_yaml(c))
    assert parse_options("sft", sft, ["--config", "again.yaml"])[0] == c


def test_weights_that_are_no_numbers_are_one_line(capsys):
    words = ["--bundle", "b", "--out", "o", "--train.steps", "1", "--data", "{data/sni: much}"]
    assert cli.main(["sft", *words]) == 2
    said = capsys.readouterr().err
    assert said == "nanollm sft: data: expected a folder or {folder: weight, ...}, got {data/sni: much}\n"


def test_the_settings_of_a_run_are_saved_resolved(run_config, folders):
    c = run_config(steps=1, data=folders[0], dtype="auto")
    sft.run(c)
    saved = read_mapping(c.out / "config.yaml")
    assert saved["data"] == {folders[0].as_posix(): 1.0}
    assert saved["dtype"] in ("bfloat16", "float16", "float32")
