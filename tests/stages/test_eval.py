"""Whatever is asked in one call is measured, saved and said; and what makes no sense is refused before it begins."""

import json
import sys
from dataclasses import replace

import pytest

from nanollm import cli
from nanollm.data.shards import Shards
from nanollm.durable import sha256_of
from nanollm.evals.stats import paired, pass_at_k, wilson
from nanollm.stages.eval import Config, EvalTask, plan, run
from nanollm.text.train_tokenizer import train
from tests.conftest import STORY
from tests.evals.eval_json import undocumented
from tests.stages.conftest import MODEL, untrained

SHAPE = replace(MODEL, context_length=64)

TASK = """
from nanollm.sources.gsm8k import Problem

class Even:
    def problems(self, split):
        return [Problem(f"{split} {n}", str(n)) for n in range(12)]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0

class Broken(Even):
    def grade(self, problem, reply):
        raise RuntimeError("out of order")
"""
EVEN = EvalTask(name="mine_for_eval:Even", split="dev")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tokenizer):
    """Two bundles of other weights, and a third one with another tokenizer as well."""
    folder = tmp_path_factory.mktemp("bundles")
    small = train([STORY.read_text("utf-8")], folder / "small.model", vocab_size=400)

    return {
        "first": untrained(folder / "first" / "bundle", SHAPE, tokenizer),
        "second": untrained(folder / "second" / "bundle", SHAPE, tokenizer, seed=7),
        "other tokenizer": untrained(folder / "third" / "bundle", replace(SHAPE, vocab_size=400), small, seed=2),
    }


@pytest.fixture(autouse=True)
def own_task(tmp_path, monkeypatch):
    """A task that lies in the current folder, as a user's would."""
    (tmp_path / "mine_for_eval.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine_for_eval", None)


@pytest.fixture
def measure(bundles, tmp_path):
    """measure(**settings of Config): the content of eval.json."""

    def make(**settings):
        defaults = {"bundle": bundles["first"], "out": tmp_path / "out", "max_tokens": 8, "dtype": "float32"}
        printed = json.loads(run(Config(json=True, **defaults | settings)))
        assert printed == json.loads((tmp_path / "out" / "eval.json").read_text())
        return printed

    return make


def saved(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text("utf-8").splitlines()]


# --- problems ---


def test_the_score_is_that_of_the_saved_replies(measure, tmp_path, bundles):
    evaluation = measure(task=EVEN)
    records = saved(tmp_path)
    assert [(record["question"], record["gold"]) for record in records] == [(f"dev {n}", str(n)) for n in range(12)]
    right = [len(record["greedy"]["replies"][0]) % 2 == 0 for record in records]
    assert [record["greedy"]["verdicts"]["correct"] for record in records] == [[verdict] for verdict in right]
    low, high = wilson(sum(right), 12)
    score = evaluation["bundle"]["greedy"]["scores"]["correct"]
    assert score == {"value": sum(right) / 12, "n": 12, "correct": sum(right), "low": low, "high": high}
    assert evaluation["bundle"]["digest"] == sha256_of(bundles["first"] / "provenance.json")
    assert evaluation["settings"]["task"] | {"seed": 0} == evaluation["settings"]["task"]
    assert evaluation["seconds"] >= evaluation["bundle"]["greedy"]["seconds"] > 0


def test_pass_at_k_is_that_of_the_saved_samples(measure, tmp_path):
    evaluation = measure(task=EVEN, samples=4, k=[1, 2, 4], seed=5)
    counts = [sum(record["samples"]["verdicts"]["correct"]) for record in saved(tmp_path)]
    scores = evaluation["bundle"]["samples"]["scores"]["correct"]
    assert list(scores) == ["pass@1", "pass@2", "pass@4"]
    for k in (1, 2, 4):
        expected = pass_at_k(counts, 4, k)
        assert scores[f"pass@{k}"] == {"value": expected.value, "low": expected.low, "high": expected.high, "n": 12}
    assert all(len(record["greedy"]["replies"]) == 1 for record in saved(tmp_path))


def test_the_same_seed_gives_the_same_evaluation(measure, tmp_path):
    def figures(seed):
        return measure(task=EVEN, samples=2, seed=seed), saved(tmp_path)

    (_, first), (_, same), (_, other) = figures(1), figures(1), figures(50)
    assert first == same != other


def test_another_bundle_is_compared_on_the_same_problems(measure, tmp_path, bundles):
    evaluation = measure(task=EVEN, against=bundles["second"], samples=2)
    records = saved(tmp_path)
    ours, theirs = ([r[name]["verdicts"]["correct"][0] for r in records] for name in ("greedy", "against"))
    expected = paired(ours, theirs)
    difference = evaluation["difference"]["correct"]
    assert (difference["difference"], difference["low"], difference["high"], difference["p"]) == (
        expected.difference,
        expected.low,
        expected.high,
        expected.p,
    )
    assert "samples" not in evaluation["against"]
    assert evaluation["against"]["path"] == str(bundles["second"])


def test_a_bundle_against_itself_differs_in_nothing(measure, bundles):
    difference = measure(task=EVEN, against=bundles["first"])["difference"]["correct"]
    assert (difference["difference"], difference["p"]) == (0.0, 1.0)


def test_each_bundle_reads_with_its_own_tokenizer(measure, bundles, tmp_path, token_files, capsys):
    text = tmp_path / "text.txt"
    text.write_text(STORY.read_text("utf-8"), encoding="utf-8")
    evaluation = measure(task=EVEN, text=[text], data=token_files, against=bundles["other tokenizer"])
    (ours,), (theirs,) = evaluation["bundle"]["text"], evaluation["against"]["text"]
    assert ours["bytes"] == theirs["bytes"] == text.stat().st_size
    assert ours["tokens"] < theirs["tokens"]
    assert "data" in evaluation["bundle"]
    assert "data" not in evaluation["against"]
    assert "another tokenizer" in capsys.readouterr().err


def test_word_problems_are_graded_in_three_ways_and_their_answers_can_vote(measure, tokenizer, tmp_path):
    bundle = untrained(tmp_path / "wide", replace(SHAPE, context_length=256), tokenizer)
    found = measure(bundle=bundle, task=EvalTask(name="words", split="heldout"), n=3, samples=2)["bundle"]
    scores = found["greedy"]["scores"]
    assert {name: score["n"] for name, score in scores.items()} == {"strict": 3, "flexible": 3, "checked": 3}
    assert {name: list(scores) for name, scores in found["samples"]["scores"].items()} == {
        "strict": ["pass@1", "pass@2", "maj@2"],
        "flexible": ["pass@1", "pass@2", "maj@2"],
        "checked": ["pass@1", "pass@2"],
    }
    assert found["samples"]["scores"]["strict"]["maj@2"]["n"] == 3


def test_fewer_problems_than_asked_for_are_all_taken(measure, capsys):
    assert measure(task=EVEN, n=1000)["bundle"]["greedy"]["scores"]["correct"]["n"] == 12
    assert "has 12 problems, fewer than --n 1,000" in capsys.readouterr().err


def test_a_broken_grader_costs_no_evaluation(measure, capsys):
    greedy = measure(task=EvalTask(name="mine_for_eval:Broken"))["bundle"]["greedy"]
    assert (greedy["grader_faults"], greedy["scores"]["correct"]["correct"]) == (12, 0)
    assert capsys.readouterr().err.count("out of order") == 1


# --- text ---


def test_text_and_token_files_are_measured_in_one_call(measure, tmp_path, token_files, tokenizer):
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "folder/b.txt", "folder/c.txt"):
        (tmp_path / name).write_text("The king rode out. " * 20)
    evaluation = measure(text=[tmp_path / "a.txt", tmp_path / "folder"], data=token_files)["bundle"]
    a, folder = evaluation["text"]
    assert (folder["bytes"], folder["tokens"]) == (2 * a["bytes"], 2 * a["tokens"])
    assert folder["bits_per_byte"] == pytest.approx(a["bits_per_byte"], rel=1e-4)
    assert (a["n"], a["low"], a["high"]) == (1, None, None)
    val = Shards.open(token_files, "val", tokenizer_fingerprint=tokenizer.fingerprint)
    assert (folder["n"], evaluation["data"][0]["n"]) == (2, len(val.document_offsets()))
    assert 0 < evaluation["data"][0]["low"] < evaluation["data"][0]["bits_per_byte"] < evaluation["data"][0]["high"]
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_two_bundles_are_compared_document_by_document(measure, bundles, tmp_path, token_files):
    words = STORY.read_text("utf-8").split()
    lines = [{"text": " ".join(words[start : start + 9 + start % 7])} for start in range(0, 200, 10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = {"text": [tmp_path / "a.jsonl"], "data": token_files}
    evaluation = measure(**texts, against=bundles["second"])
    for difference, ours, theirs in zip(
        evaluation["bits_difference"],
        [*evaluation["bundle"]["text"], *evaluation["bundle"]["data"]],
        [*evaluation["against"]["text"], *evaluation["against"]["data"]],
        strict=True,
    ):
        assert difference["path"] == ours["path"]
        assert difference["difference"] == pytest.approx(ours["bits_per_byte"] - theirs["bits_per_byte"])
        assert difference["high"] - difference["low"] < ours["high"] - ours["low"]  # what is hard is so for both
    assert evaluation["bits_difference"][0]["n"] == 20
    assert [each["difference"] for each in measure(**texts, against=bundles["first"])["bits_difference"]] == [0, 0]


def test_conversations_are_measured_by_their_replies(measure, tmp_path, prepared):
    answers = [f"number {n}." for n in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": a}]} for a in answers
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    chats = tmp_path / "chat.jsonl"
    (data,) = measure(data=prepared("chat", chats, val_input=[chats]))["bundle"]["data"]
    assert data["bytes"] == sum(map(len, answers))


# --- contamination ---


def test_a_question_in_the_training_text_is_named_and_left_out_of_a_second_score(measure, tmp_path):
    (tmp_path / "mine_for_eval.py").write_text(
        TASK.replace('f"{split} {n}"', 'f"{n} | " + "a b c d e f g h i " + f"{n}"')
    )
    training = tmp_path / "training.jsonl"
    training.write_text('{"text": "nothing"}\n{"text": "x 5: A, B, C, D, E, F, G, H, I - 5!"}\n')
    evaluation = measure(task=EVEN, contamination=[training])["contamination"]
    (overlap,) = evaluation["overlaps"]
    assert (overlap["question"], overlap["share"]) == (6, 1.0)
    assert overlap["where"] == f"{training}, document 2"
    clean, copied = evaluation["clean_scores"]["correct"], evaluation["copied_scores"]["correct"]
    right = [record["greedy"]["verdicts"]["correct"][0] for record in saved(tmp_path)]
    assert (copied["n"], copied["correct"]) == (1, int(right[5]))
    assert (clean["n"], clean["correct"]) == (11, sum(right) - right[5])
    apart = evaluation["copied_minus_clean"]["correct"]
    assert apart["difference"] == copied["value"] - clean["value"]
    assert apart["low"] < apart["difference"] < apart["high"]


def test_token_files_are_searched_too(measure, token_files):
    evaluation = measure(task=EVEN, contamination=[token_files], ngram=2)["contamination"]
    assert evaluation["documents"] > 100
    assert evaluation["text_bytes"] > 10_000


# --- what is printed ---


def test_the_lines_say_what_was_measured(bundles, tmp_path):
    (tmp_path / "a.txt").write_text("The king rode out.")
    (tmp_path / "b.jsonl").write_text('{"text": "dev 3"}\n')
    config = Config(
        bundle=bundles["first"],
        task=EVEN,
        samples=2,
        against=bundles["second"],
        text=[tmp_path / "a.txt"],
        contamination=[tmp_path / "b.jsonl"],
        ngram=2,
        max_tokens=4,
        out=tmp_path / "out",
        dtype="float32",
    )
    printed = run(config).splitlines()
    evaluation = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert undocumented(evaluation) == {"pass@1", "pass@2"}
    score = evaluation["bundle"]["greedy"]["scores"]["correct"]
    interval = f"({100 * score['low']:.1f} to {100 * score['high']:.1f})"
    task = "mine_for_eval:Even dev"
    ours, theirs = bundles["first"], bundles["second"]
    assert printed[0] == f"{ours}, {task}, correct, greedy: {100 * score['value']:.1f} % {interval}, n 12"
    assert printed[1].startswith(f"{ours}, {task}, correct, pass@1, temperature 1: ")
    assert printed[2].startswith(f"{ours}, {task}, correct, pass@2, temperature 1: ")
    (mine,), (other,) = evaluation["bundle"]["text"], evaluation["against"]["text"]
    of_text = f"{tmp_path / 'a.txt'}, 18 bytes"
    assert printed[3] == f"{ours}, {of_text}: {mine['bits_per_byte']:.4f} bits per byte, n 1"
    assert printed[4].startswith(f"{theirs}, {task}, correct, greedy: ")
    assert printed[5] == f"{theirs}, {of_text}: {other['bits_per_byte']:.4f} bits per byte, n 1"
    assert printed[6].startswith(f"{ours}, {task}, correct, greedy, clean questions: ")
    assert printed[7].startswith(f"{ours}, {task}, correct, greedy, copied questions: ")
    assert [line.partition("replies: ")[0] for line in printed[8:10]] == [f"{ours}, ", f"{theirs}, "]
    assert printed[10].startswith(f"{ours} minus {theirs}: {task}, correct: ") and " points (" in printed[10]
    gap = mine["bits_per_byte"] - other["bits_per_byte"]
    assert printed[11] == f"{ours} minus {theirs}: {tmp_path / 'a.txt'}: {gap:+.4f} bits per byte"
    assert printed[12].startswith(f"{task}, correct: copied minus clean questions: ")
    assert printed[13] == f"{task}: 1 of 12 questions share 2 words in a row with the training text"
    assert len(printed) == 14


def test_without_out_the_files_lie_beside_the_bundle(bundles):
    folder = bundles["first"].parent / "eval"
    assert Config(bundle=bundles["first"], task=EVEN).folder == folder / "mine_for_eval-Even-dev"
    assert Config(bundle=bundles["first"], text=[STORY]).folder == folder / "text"


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(bundles, tmp_path):
    said = plan(Config(bundle=bundles["first"], task=EVEN, samples=3, text=[STORY], out=tmp_path / "out"))
    assert said.startswith("12 problems of mine_for_eval:Even dev, 48 replies; bits per byte of ")
    assert not (tmp_path / "out").exists()


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to measure; ask for --task.name words .*--text .* or --data"),
        ({"task": EVEN, "n": 0}, "--n must be at least 1, got 0"),
        ({"task": EVEN, "max_tokens": 0}, "--max_tokens must be at least 1, got 0"),
        ({"task": EVEN, "samples": -1}, "--samples must be at least 0"),
        ({"task": EVEN, "samples": 4, "k": [1, 8]}, "--k must be from 1 to --samples 4, got 8"),
        ({"task": EVEN, "k": [1]}, "--k must be from 1 to --samples 0, got 1"),
        ({"text": [STORY], "samples": 2}, "choose some with --task.name"),
        ({"text": [STORY], "contamination": [STORY]}, "choose some with --task.name"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Config(bundle=tmp_path, **settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task.name", "wrods"], "task.name must be words, gsm8k, guess or module:Name, got 'wrods'"),
        (["--task.split", "dev"], "--task.name is missing"),
        (
            ["--task.name", "words", "--task.split", "dev"],
            "has no split 'dev'; it has train, test, new_numbers, heldout",
        ),
        (["--task.name", "mine_for_eval:Odd"], "has no attribute 'Odd'"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--text", "mine_for_eval.py"], "is not one of .txt"),
        (["--data", "nowhere"], "nowhere is not a prepared folder"),
        (["--task.name", "words", "--contamination", "nowhere"], "nowhere does not exist"),
        (["--task.name", "words", "--against", "nowhere"], "nowhere is not a bundle"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_a_model_is_loaded(bundles, capsys, monkeypatch, words, message):
    monkeypatch.setattr("nanollm.stages.eval.load_bundle", pytest.fail)
    assert cli.main(["eval", str(bundles["first"]), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert message in said.err


def test_token_files_alone_cannot_be_compared_across_tokenizers(bundles, token_files):
    with pytest.raises(ValueError, match=r"holds the ids of another tokenizer than .*; compare them on --text"):
        run(Config(bundle=bundles["first"], data=token_files, against=bundles["other tokenizer"]))


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a bundle \(no such folder\)"):
        run(Config(bundle=tmp_path / "nowhere", task=EVEN))


def test_token_files_given_as_text_are_refused(bundles, token_files):
    with pytest.raises(ValueError, match=f"measure it with --data {token_files}"):
        run(Config(bundle=bundles["first"], text=[token_files]))


def test_text_without_a_readable_record_is_refused(bundles, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="there is no text to measure"):
        run(Config(bundle=bundles["first"], text=[tmp_path / "empty.txt"], out=tmp_path / "out", dtype="float32"))


def test_it_runs_from_the_command_line(bundles, tmp_path, capsys):
    words = ["--task.name", "mine_for_eval:Even", "--n", "2", "--max_tokens", "3", "--samples", "2", "--k", "1", "2"]
    assert cli.main(["eval", str(bundles["first"]), *words, "--out", "here", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["k"] == [1, 2]
    assert (tmp_path / "here" / "eval.json").exists()
