"""The verb distill trains, goes on where it stopped, and refuses what cannot work."""

import dataclasses
from statistics import fmean

import pytest

from nanollm.bundle import load_bundle, save_bundle
from nanollm.cli import main
from nanollm.model.lora import LoraConfig
from nanollm.model.transformer import Transformer
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import distill, preprocess
from nanollm.stages.preprocess import WordsConfig
from nanollm.text.train_tokenizer import train
from nanollm.train.checkpoint import checkpoints
from nanollm.train.optim import OptimConfig
from tests.conftest import STORY
from tests.stages.conftest import MODEL, interrupted, told, untrained, weights_of

SHAPE = dataclasses.replace(MODEL, context_length=64)
LARGER = dataclasses.replace(SHAPE, d_model=48)


@pytest.fixture(scope="module")
def folders(tokenizer, tokenizer_path, tmp_path_factory):
    """Student, teacher, conversations and documents."""
    folder = tmp_path_factory.mktemp("distill")
    untrained(folder / "student", SHAPE, tokenizer, seed=3)
    weights = Transformer(LARGER).init(4).state_dict()
    weights["head.weight"] *= 5  # it has a clear opinion
    save_bundle(folder / "teacher", LARGER, weights, tokenizer, {"made_by": "a test"})
    words = WordsConfig(levels=[1], largest=5, count=40)
    shared = {"tokenizer_path": tokenizer_path, "seed": 0}
    preprocess.run(preprocess.Config(kind="words", words=words, save_dir=folder / "lessons", **shared))
    preprocess.run(preprocess.Config(kind="text", input=[STORY], save_dir=folder / "texts", **shared))
    return folder


@pytest.fixture
def run_config(folders, tmp_path):
    def make(out="run", steps=4, **changes):
        settings = {
            "bundle": folders / "student",
            "teacher": folders / "teacher",
            "out": tmp_path / out,
            "task": TaskConfig(name="tests.faults.even:Even"),
            "train": distill.DistillTrainConfig(steps=steps, batch_size=4, micro_batch_size=2, save_every=2),
            "rollout": RolloutConfig(prompts=3, group_size=4, max_tokens=10, resample=0),
            "optim": OptimConfig(name="adamw", lr=1e-2, warmup_steps=1, balance_rate=0.0),
            "validation_problems": 4,
            "dtype": "float32",
        }
        return distill.Config(**settings | changes)

    return make


@pytest.mark.parametrize("data", [None, "lessons", "texts"])
def test_the_student_moves_to_its_teacher(run_config, folders, data):
    changes = {} if data is None else {"mode": "logits", "data": folders / data}
    c = run_config(steps=24, **changes)
    folder = distill.run(c)
    losses = [line["loss"] for line in told(c.out)[1:]]
    assert all(loss > 0 for loss in losses)
    assert losses[-1] < 0.9 * losses[0]
    assert "distill" in load_bundle(folder).provenance["made_by"]
    page = (c.out / "report.html").read_text()
    assert "Distillation on " in page
    assert ("Learning from its own replies" in page) == (data is None)
    assert ("reward" in told(c.out)[1]) == (data is None)


@pytest.mark.parametrize("mode", ["on_policy", "logits"])
def test_resumed_is_uninterrupted(run_config, folders, mode, monkeypatch):
    changes = {"mode": mode} | ({"data": folders / "lessons"} if mode == "logits" else {"credit": "reply"})
    whole, parts = run_config("whole", **changes), run_config("parts", **changes)
    distill.run(whole)
    with interrupted(monkeypatch, distill, "train_step", after=3):
        distill.run(parts)
    assert checkpoints(parts.out / "checkpoints")[0].name == "step-00000002"
    distill.run(parts)
    assert weights_of(parts.out) == weights_of(whole.out)
    assert told(parts.out) == told(whole.out)


def test_a_teacher_of_another_vocabulary_is_refused(run_config, tmp_path):
    other = train([STORY.read_text(encoding="utf-8")[::-1]], tmp_path / "other.model", vocab_size=600)
    teacher = untrained(tmp_path / "other", SHAPE, other)
    with pytest.raises(
        ValueError, match=r"the teacher .* has tokenizer \w{6}, the model \w{6}; a teacher must have the same one"
    ):
        distill.run(run_config(teacher=teacher))


def test_a_teacher_that_predicts_more_ids_is_refused(run_config, tokenizer, tmp_path):
    teacher = untrained(tmp_path / "wide", dataclasses.replace(SHAPE, vocab_size=640), tokenizer)
    with pytest.raises(ValueError, match="the teacher predicts 640 tokens, the student 600"):
        distill.run(run_config(teacher=teacher))


def test_the_tools_of_the_texts_are_the_students(run_config, tokenizer, tokenizer_path, tmp_path):
    words = WordsConfig(levels=[1], largest=5, count=40)
    lessons = preprocess.Config(
        kind="words", words=words, tools=["calculator"], tokenizer_path=tokenizer_path, save_dir=tmp_path / "lessons"
    )
    preprocess.run(lessons)
    c = run_config(steps=1, mode="logits", data=tmp_path / "lessons")
    assert load_bundle(distill.run(c)).tools == ["calculator"]


def test_one_reply_to_each_problem_is_enough(run_config):
    c = run_config(steps=1, rollout=RolloutConfig(prompts=3, group_size=1, max_tokens=10, resample=0))
    distill.run(c)
    assert told(c.out)[1]["loss"] > 0


def test_a_dry_run_says_what_would_be_done(run_config, folders):
    assert "4 steps x 3 of" in distill.plan(run_config())
    told = distill.plan(run_config(mode="logits", data=folders / "lessons"))
    assert f"4 texts of {folders / 'lessons'}" in told


def test_a_teacher_that_reads_less_is_refused(run_config, tokenizer, tmp_path):
    teacher = untrained(tmp_path / "short", dataclasses.replace(SHAPE, context_length=32), tokenizer)
    with pytest.raises(ValueError, match="the teacher's context of 32 tokens is shorter than the student's, 64"):
        distill.run(run_config(teacher=teacher))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rollout.resample=2"], "distill replaces no groups"),
        (["--optim.balance_weight=0.1"], "optim.balance_weight has no effect"),
        (["--mode=logits"], "mode logits needs --data"),
        (["--data=lessons"], "mode on_policy learns from replies alone"),
        (["--ce_weight=0.5"], "ce_weight has no effect in mode on_policy"),
        (["--mode=logits", "--data=lessons", "--credit=reply"], "credit has no effect in mode logits"),
        (["--mode=logits", "--data=lessons", "--ce_weight=1"], "ce_weight must be from 0 to below 1"),
    ],
)
def test_what_has_no_effect_is_said(words, told, capsys):
    assert main(["distill", "--bundle=a", "--teacher=b", "--out=c", "--train.steps=1", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("data", [None, "lessons"])
def test_an_adapter_learns_from_a_teacher(run_config, folders, data):
    changes = {} if data is None else {"mode": "logits", "data": folders / data}
    c = run_config(steps=24, lora=LoraConfig(rank=8), **changes)
    distill.run(c)
    losses = [line["loss"] for line in told(c.out)[1:]]
    assert fmean(losses[-5:]) < fmean(losses[:5])
    assert (c.out / "adapter" / "adapter.safetensors").exists()
