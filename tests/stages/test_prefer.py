"""Preferences teach a model which reply to give; what cannot be used is refused or counted."""

import dataclasses
import json

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.rl.preference import PreferenceConfig
from nanollm.stages import prefer
from nanollm.stages.prefer import Config, PreferTrainConfig
from nanollm.text.train_tokenizer import train as train_tokenizer
from nanollm.train.metrics import read_metrics
from nanollm.train.optim import OptimConfig
from tests.conftest import STORY
from tests.stages.conftest import FILES_OF_A_RUN, MODEL, told, untrained, weights_of

SHAPE = dataclasses.replace(MODEL, context_length=64)
LOSSES = ("dpo", "ipo", "simpo", "kto")


@pytest.fixture(scope="session")
def bundle(tokenizer, tmp_path_factory):
    """A model that has learned nothing yet."""
    return untrained(tmp_path_factory.mktemp("base") / "bundle", SHAPE, tokenizer)


def written(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


def pair(n, **changes):
    return {"prompt": f"What comes after {n}?", "chosen": f"{n + 1}.", "rejected": f"{n} is all I know."} | changes


def pairs_of(path, count):
    return written(path, [pair(n) for n in range(count)])


@pytest.fixture
def pairs(tmp_path):
    return pairs_of(tmp_path / "pairs.jsonl", 20)


@pytest.fixture
def other_bundle(tmp_path):
    """One with a tokenizer of its own."""
    tokenizer = train_tokenizer([STORY.read_text("utf-8")[:5000]], tmp_path / "other.model", vocab_size=400)
    return untrained(tmp_path / "other", dataclasses.replace(SHAPE, vocab_size=400), tokenizer)


@pytest.fixture
def run_config(bundle, pairs, tmp_path):
    """run_config(out=..., steps=..., loss=..., **fields of Config): a run of seconds in float32."""

    def make(steps: int = 10, out: str = "run", loss="dpo", **fields) -> Config:
        defaults = {
            "bundle": bundle,
            "data": pairs,
            "out": tmp_path / out,
            "train": PreferTrainConfig(
                steps=steps, batch_size=8, micro_batch_size=2, log_every=1, validate_every=5, save_every=3
            ),
            "objective": PreferenceConfig(loss=loss),
            "optim": OptimConfig(lr=3e-3, warmup_steps=2),
            "dtype": "float32",
        }
        return Config(**defaults | fields)

    return make


# A run.


@pytest.mark.parametrize("loss", LOSSES)
def test_the_margin_rises_on_pairs_that_are_trained_and_on_others(run_config, bundle, tmp_path, loss):
    others = written(tmp_path / "others.jsonl", [pair(n) for n in range(20, 30)])
    c = run_config(loss=loss, val_data=others)
    made = prefer.run(c)
    assert {path.name for path in c.out.iterdir()} == FILES_OF_A_RUN
    lines = read_metrics(c.out)
    first, last = lines[1], lines[-1]
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"] + 0.01
    assert lines[-1]["val_rewards/margins"] > lines[0]["val_rewards/margins"] + 0.01
    assert ("kl" in last) == (loss == "kto")
    assert ("rewards/accuracies" in last) == (loss != "kto")
    if loss != "simpo":  # before training the policy is the reference
        assert abs(first["rewards/chosen"]) + abs(lines[0]["val_rewards/chosen"]) < 1e-5
    provenance, parent = load_bundle(made).provenance, load_bundle(bundle).provenance
    assert provenance["parent"] == parent
    assert ("reference" in provenance["inputs"]) == (loss != "simpo")
    page = (c.out / "report.html").read_text()
    assert "Learning from preferences" in page
    assert "nats per trained token" not in page


class Killed(BaseException):
    pass


def after_six_steps(monkeypatch, run_config, loss):
    """A run that was killed behind its second checkpoint, and the function that takes steps as it was before."""
    taken, right = [], prefer.train_step

    def step(*given):
        taken.append(given)
        if len(taken) == 8:
            raise Killed
        return right(*given)

    monkeypatch.setattr(prefer, "train_step", step)
    c = run_config(loss=loss, out="killed")
    with pytest.raises(Killed):
        prefer.run(c)
    monkeypatch.setattr(prefer, "train_step", right)
    return c


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_killed_and_resumed_is_uninterrupted(run_config, monkeypatch, loss):
    whole, killed = run_config(loss=loss), after_six_steps(monkeypatch, run_config, loss)
    for c in (whole, killed):
        prefer.run(c)
    assert (weights_of(killed.out), told(killed.out)) == (weights_of(whole.out), told(whole.out))


def test_a_reference_that_is_the_policy_as_it_was_resumed(run_config, monkeypatch):
    """A mistake put back: the reference is computed anew after a restart, with the weights as they stand."""
    whole, killed = run_config(), after_six_steps(monkeypatch, run_config, "dpo")
    prefer.run(whole)
    states, right = [], prefer.TrainState.start
    monkeypatch.setattr(prefer.TrainState, "start", lambda *given: states.append(right(*given)) or states[-1])
    of = prefer.with_reference
    monkeypatch.setattr(prefer, "with_reference", lambda known, model, compute: of(known, states[-1].model, compute))
    prefer.run(killed)
    assert weights_of(killed.out) != weights_of(whole.out)


def test_a_finished_run_started_again_changes_nothing(run_config):
    c = run_config(steps=4)
    prefer.run(c)
    before = weights_of(c.out), told(c.out)
    prefer.run(c)
    assert (weights_of(c.out), told(c.out)) == before


def test_another_loss_or_other_pairs_are_another_run(run_config, tmp_path):
    prefer.run(run_config(steps=1))
    for changes, key in (
        ({"loss": "ipo"}, "objective.loss"),
        ({"data": pairs_of(tmp_path / "two.jsonl", 9)}, "inputs.data"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {key}"):
            prefer.run(run_config(steps=1, **changes))


# What is read.


def plan_of(run_config, path, records, **fields):
    return prefer.plan(run_config(data=written(path, records), **fields))


def test_messages_texts_and_prompts_inside_the_replies_are_the_same_pairs(run_config, tmp_path):
    def said(role, content):
        return {"role": role, "content": content}

    asked, yes, no = said("user", "Well?"), said("assistant", "Yes."), said("assistant", "No.")
    forms = [
        {"prompt": "Well?", "chosen": "Yes.", "rejected": "No.", "score": 3},
        {"prompt": [asked], "chosen": [yes], "rejected": [no]},
        {"chosen": [asked, yes], "rejected": [asked, no]},
    ]
    known = [prefer._open(run_config(data=written(tmp_path / f"{n}.jsonl", [each])))[1] for n, each in enumerate(forms)]
    assert len({each.fingerprint for each in known}) == 1
    talk = [said("system", "Be brief."), asked, yes, said("user", "Why?")]
    c = run_config(data=written(tmp_path / "talk.jsonl", [{"prompt": talk, "chosen": [yes], "rejected": [no]}]))
    bundle, known, _ = prefer._open(c)
    for reply, text in zip(known.examples[0], ("Yes.", "No."), strict=True):
        assert bundle.tokenizer.decode(reply.ids[reply.trained].tolist()) == text  # only the last reply


def test_what_cannot_be_used_is_left_out_and_said(run_config, tmp_path):
    long = "and on " * 70
    records = [
        *(pair(n) for n in range(3)),
        pair(4, rejected="5."),
        pair(5, chosen=""),
        pair(6, chosen=[{"role": "assistant", "content": " "}], rejected=[{"role": "assistant", "content": "6"}]),
        pair(7, prompt=long),
        pair(8, rejected=long),
        pair(9, chosen=f"{long} a", rejected=f"{long} b"),  # equal as far as the context goes
    ]
    said = plan_of(run_config, tmp_path / "odd.jsonl", records)
    assert "epochs of " in said
    for part in (
        "odd.jsonl: 4 examples",
        "left out, as chosen equals rejected: 2",
        "left out, as a reply is empty: 2",
        "left out, as the prompt fills the context: 1",
        "replies cut at the end of the context: ",
    ):
        assert part in said
    with pytest.raises(ValueError, match="no preference to learn from: left out, as a reply is empty: 1"):
        plan_of(run_config, tmp_path / "none.jsonl", [pair(5, rejected="")])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"malformed JSON"),
        ("[1]\n", r"expected a JSON object, got list"),
        ({"prompt": "a", "text": "b"}, r"expected prompt, chosen and rejected, .*, got prompt, text"),
        (pair(1, chosen=5), r"chosen: expected text or a list of messages with role and content, got 5"),
        (pair(1, prompt={"a": 1}), r"prompt: expected text or a list of messages .*, got \{'a': 1\}"),
        (pair(1, prompt=5), r"prompt: expected text or a list of messages .*, got 5"),
        (pair(1, prompt=""), r"chosen: a conversation is an optional system message.*; got assistant"),
        (pair(1, rejected=[{"role": "user", "content": "b"}]), r"rejected: a conversation is .*; got user, user"),
        (
            pair(1, rejected=[{"role": "assistant", "content": 7}]),
            r"rejected: message 2: content must be text, got int",
        ),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            r"chosen: the last message must be the assistant's",
        ),
        ({"prompt": "a", "completion": "b", "label": 1}, r"label must be true or false, got 1"),
        (
            {"question": "a", "reply": 5, "reward": 1},
            r"expected a reply of text and a reward, a number or null, got 5 and 1",
        ),
        ({"question": "a", "reply": "5", "reward": 1, "turns": True}, r"a conversation with an environment has no"),
    ],
)
def test_a_malformed_line_is_refused_by_its_file_and_number(run_config, tmp_path, line, reason):
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {reason}"):
        plan_of(run_config, tmp_path / "bad.jsonl", [pair(0), line])


def test_replies_that_answer_different_prompts_are_no_pair(run_config, tmp_path):
    sides = {
        side: [{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes."}]
        for side, asked in (("chosen", "a"), ("rejected", "b"))
    }
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: chosen and rejected answer different prompts"):
        plan_of(run_config, tmp_path / "bad.jsonl", [sides])


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (
            [{"prompt": str(n), "completion": "a", "label": True} for n in range(3)],
            "both kinds, got 3 replies with true",
        ),
        ([pair(1), pair(1, chosen="b")], "replies to at least two prompts, got one"),
    ],
)
def test_kto_needs_both_labels_and_two_prompts(run_config, tmp_path, records, reason):
    with pytest.raises(ValueError, match=reason):
        plan_of(run_config, tmp_path / "one.jsonl", records, loss="kto")


def test_kto_takes_pairs_apart_and_pairs_are_not_made_of_labels(run_config, tmp_path):
    labels = [{"prompt": str(n), "completion": "a", "label": n % 2 == 0} for n in range(4)]
    assert "8 examples" in plan_of(run_config, tmp_path / "both.jsonl", [*labels, pair(0), pair(1)], loss="kto")
    with pytest.raises(ValueError, match=r"dpo compares pairs, .* --objective\.loss kto"):
        plan_of(run_config, tmp_path / "labels.jsonl", labels)


@pytest.mark.parametrize("reward", ["", ', "reward": NaN', ', "reward": "1"'])
def test_rollouts_without_a_number_as_reward_are_refused(run_config, tmp_path, reward):
    (tmp_path / "step-00000001.jsonl").write_text(f'{{"question": "q", "reply": "r"{reward}}}\n')
    with pytest.raises(ValueError, match="expected a reply of text and a reward, a number or null"):
        prefer.plan(run_config(data=tmp_path / "step-00000001.jsonl"))


def test_rollouts_become_pairs_of_right_and_wrong_replies_to_one_problem(run_config, tmp_path):
    def rolled(question, *replies):
        return [
            {"question": question, "reply": reply, "reward": reward, "stop": "length" if reply == "cut" else "end"}
            for reply, reward in replies
        ]

    folder = tmp_path / "rollouts"
    written(
        folder / "step-1.jsonl", rolled("a", ("r", 1), ("w", 0), ("cut", 0), ("s", 1)) + rolled("b", ("x", 0), ("y", 0))
    )
    written(folder / "step-2.jsonl", rolled("a", ("v", None), ("u", 0.5)) + rolled("c", ("p", 0), ("q", 0), ("z", 1)))
    bundle, known, _ = prefer._open(run_config(data=folder))
    end = bundle.tokenizer.encode("")
    texts = [
        tuple(bundle.tokenizer.decode(reply.ids[reply.trained].tolist()) for reply in pair) for pair in known.examples
    ]
    assert texts == [("r", "cut"), ("s", "w"), ("u", "v"), ("z", "q")]
    ends = [tuple(bool(reply.trained[-1]) and reply.ids[-1] for reply in pair) for pair in known.examples]
    assert len({chosen for chosen, _ in ends}) == 1  # the end mark
    assert ends[0][1] != ends[0][0] == ends[1][1]  # what was cut off has none
    assert end == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective.loss", "orpo"], "orpo"),
        (["--objective.beta", "0"], "objective.beta must be above 0"),
        (["--objective.label_smoothing", "0.5"], "objective.label_smoothing must be from 0 to below 0.5"),
        (["--objective.loss", "ipo", "--objective.label_smoothing", "0.1"], "objective.label_smoothing is for dpo"),
        (["--objective.loss", "ipo", "--objective.sft_weight", "1"], "objective.sft_weight is for dpo"),
        (["--objective.sft_weight", "-1"], "objective.sft_weight must be at least 0, got -1"),
        (["--objective.gamma", "1"], "objective.gamma is for simpo"),
        (["--objective.loss", "simpo", "--reference", "x"], "simpo has no reference"),
        (["--optim.balance_weight", "0.1"], "optim.balance_weight has no effect on preferences"),
    ],
)
def test_options_that_have_no_use_are_refused(words, said, capsys):
    command = ["prefer", "--bundle", "b", "--data", "d.jsonl", "--out", "o", "--train.steps", "1", *words]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err


def test_a_reference_of_another_tokenizer_is_refused(run_config, other_bundle):
    with pytest.raises(ValueError, match=r"the reference .* must have the same one"):
        prefer.run(run_config(reference=other_bundle))
