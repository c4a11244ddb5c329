"""The verb grpo trains, goes on where it stopped, and refuses what cannot work."""

import dataclasses
import json

import pytest

from nanollm.bundle import load_bundle
from nanollm.cli import main
from nanollm.rl.loss import ObjectiveConfig
from nanollm.rl.reward import RewardConfig
from nanollm.rl.rollout import RolloutConfig
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import TaskConfig
from nanollm.stages import grpo
from nanollm.text.train_tokenizer import train
from nanollm.train.checkpoint import checkpoints
from nanollm.train.optim import OptimConfig
from tests.conftest import STORY
from tests.stages.conftest import MODEL, interrupted, told, untrained, weights_of

SHAPE = dataclasses.replace(MODEL, context_length=64)


@pytest.fixture(scope="module")
def bundle(tokenizer, tmp_path_factory):
    """An untrained model: replies by chance."""
    return untrained(tmp_path_factory.mktemp("bundles") / "untrained", SHAPE, tokenizer, seed=3)


@pytest.fixture
def run_config(bundle, tmp_path):
    def make(out="run", steps=6, **changes):
        settings = {
            "bundle": bundle,
            "out": tmp_path / out,
            "task": TaskConfig(name="tests.faults.even:Even"),
            "train": grpo.GrpoTrainConfig(steps=steps, validate_every=3, save_every=2),
            "rollout": RolloutConfig(prompts=3, group_size=4, max_tokens=10),
            "optim": OptimConfig(name="adamw", lr=1e-3, warmup_steps=1, balance_rate=0.0),
            "validation_problems": 5,
            "dtype": "float32",
        }
        return grpo.Config(**settings | changes)

    return make


def test_a_run_leaves_metrics_rollouts_checkpoints_and_a_bundle(run_config):
    c = run_config()
    folder = grpo.run(c)
    assert load_bundle(folder).provenance["replies_seen"] == 6 * 12
    lines = told(c.out)
    assert [line["step"] for line in lines] == list(range(7))
    assert "val_accuracy" in lines[0]
    assert "val_accuracy" in lines[6]
    expected = {
        "reward",
        "rewards/correct/mean",
        "frac_reward_zero_std",
        "completions/mean_length",
        "prompts_too_long",
        "faults",
    }
    trust = {
        "entropy",
        "kl",
        "clip_fraction",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    }
    assert all(expected <= line.keys() for line in lines[1:])
    learned = [line for line in lines[1:] if line["frac_reward_zero_std"] < 1]
    assert learned
    assert all(trust | {"loss", "grad_norm", "lr"} <= line.keys() for line in learned)
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in learned)
    assert len(list((c.out / "rollouts").iterdir())) == 6


@pytest.mark.parametrize("changes", [{}, {"objective": ObjectiveConfig(beta=0.1, updates=2)}], ids=str)
def test_resumed_is_uninterrupted(run_config, changes, monkeypatch):
    whole = run_config("whole", **changes)
    grpo.run(whole)
    parts = run_config("parts", **changes)
    with interrupted(monkeypatch, grpo.Collector, "collect", after=3):
        grpo.run(parts)
    assert checkpoints(parts.out / "checkpoints")[0].name == "step-00000002"
    grpo.run(parts)
    assert weights_of(parts.out) == weights_of(whole.out)
    assert told(parts.out) == told(whole.out)
    for file in (whole.out / "rollouts").iterdir():
        assert (parts.out / "rollouts" / file.name).read_bytes() == file.read_bytes()


def test_another_seed_or_group_size_or_other_problems_are_another_run(run_config, tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"Say {n}!", "answer": f"#### {n}"}) for n in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    reward = RewardConfig(weights={"length": 1.0}, soft_tokens=10)  # an untrained model is never right
    c = run_config(steps=2, task=TaskConfig(name="gsm8k", input=[tmp_path]), reward=reward)
    grpo.run(c)
    longer = dataclasses.replace(c, train=dataclasses.replace(c.train, steps=3))
    grpo.run(longer)
    with pytest.raises(ValueError, match=r"was begun with seed = 0, this run has 1"):
        grpo.run(dataclasses.replace(longer, seed=1))
    with pytest.raises(ValueError, match=r"was begun with rollout.group_size = 4, this run has 5"):
        grpo.run(dataclasses.replace(longer, rollout=dataclasses.replace(c.rollout, group_size=5)))
    with pytest.raises(ValueError, match=r"was begun with rollout.tools = None, this run has \['calculator'\]"):
        grpo.run(dataclasses.replace(longer, rollout=dataclasses.replace(c.rollout, tools=["calculator"])))
    (tmp_path / "train.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match=r"was begun with inputs.problems = "):
        grpo.run(longer)


GUESS = TaskConfig(name="guess", largest=6)


def test_runs_from_before_problems_had_columns_still_resume():
    before = "37273de57aa16ffbcb1e917111a727e6e0662dc290e28c10b23e2dab70dff9f2"  # as 0.1.0 wrote into inputs.json
    assert grpo.fingerprint([Problem("How many?", "2 #### 2")]) == before
    assert grpo.fingerprint([Problem("How many?", "2 #### 2", {"level": 3})]) == before


def test_a_run_holds_conversations(run_config):
    c = run_config(
        steps=2,
        task=GUESS,
        validation_problems=3,
        reward=RewardConfig(weights={"correct": 1, "length": 1}, soft_tokens=10),
    )
    grpo.run(c)
    first, *steps = told(c.out)
    assert first["val_accuracy"] == 0  # an untrained model says no number
    assert [line["faults"] for line in steps] == [0, 0]
    assert all(line["rewards/correct/mean"] == 0 for line in steps)
    (record, *_) = (c.out / "rollouts" / "step-00000001.jsonl").read_text().splitlines()
    assert json.loads(record)["question"] == "Guess my number from 1 to 6."


def test_a_server_that_cannot_hold_conversations_is_refused(run_config):
    rollout = RolloutConfig(prompts=3, group_size=4, max_tokens=10, engine="vllm://localhost:1")
    with pytest.raises(ValueError, match=r"a vLLM server cannot hold the conversations of task.name guess"):
        grpo.run(run_config(task=GUESS, rollout=rollout))


def test_a_reference_with_another_tokenizer_is_refused(run_config, tmp_path):
    other = train([STORY.read_text("utf-8")[:3000]], tmp_path / "other.model", vocab_size=400)
    c = run_config(objective=ObjectiveConfig(beta=0.1), reference=untrained(tmp_path / "stranger", SHAPE, other))
    with pytest.raises(ValueError, match=r"the reference .*stranger has tokenizer .* must have the same one"):
        grpo.run(c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.max_tokens", "64"], "leaves no room for a question in the context of 64 tokens"),
        (["--reward.weights", "{corect: 1.0}"], "reward.weights knows correct, calculations, format, length and"),
        (["--objective.advantage", "best"], "objective.advantage: expected mean_only|std|batch_std|reward, got best"),
    ],
)
def test_mistakes_are_told_in_one_line(bundle, tmp_path, capsys, options, message):
    command = ["grpo", "--bundle", str(bundle), "--out", str(tmp_path / "run"), "--train.steps", "1"]
    assert main([*command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_plan_says_what_a_run_would_do_and_does_nothing(run_config):
    c = run_config()
    assert "6 steps x 3 of 20 problems x 4 replies of at most 10 tokens = 72 replies" in grpo.plan(c)
    assert not c.out.exists()


def test_a_plan_counts_no_more_problems_for_a_step_than_there_are(run_config):
    c = run_config()
    more = dataclasses.replace(c, rollout=dataclasses.replace(c.rollout, prompts=32))
    assert "6 steps x 20 of 20 problems x 4 replies of at most 10 tokens = 480 replies" in grpo.plan(more)
