"""Tasks of lm-evaluation-harness are asked, written down with intervals and compared, or refused in one line."""

import json
import statistics
from dataclasses import replace
from functools import partial

import pytest

from nanollm import cli
from nanollm.evals.stats import Z, paired, wilson
from nanollm.stages.eval import Config, plan, run
from tests.evals.eval_json import undocumented
from tests.evals.harness_tasks import CHOICE, REPLY, question, write_task, write_tasks
from tests.stages.conftest import MODEL, untrained

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')

from lm_eval.tasks import TaskManager

from nanollm.evals import benchmarks
from nanollm.evals.benchmarks import choices_of, difference, interval

NAMES = ["nano_choice", "nano_reply", "nano_whole"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tokenizer):
    """Two bundles of other weights."""
    shape = replace(MODEL, context_length=128)
    folder = tmp_path_factory.mktemp("bundles")
    return [untrained(folder / str(seed) / "bundle", shape, tokenizer, seed) for seed in (0, 7)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch):
    """Reading lm_eval's 14,000 YAML files takes seconds."""
    monkeypatch.setattr(benchmarks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def compared(bundles, tasks, tmp_path_factory):
    """The folder of an evaluation of both bundles, and what it printed."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "TaskManager", partial(TaskManager, include_defaults=False))
        config = Config(
            bundle=bundles[0],
            against=bundles[1],
            harness=[",".join(NAMES)],
            harness_tasks=tasks,
            out=out,
            dtype="float32",
        )
        return out, run(config).splitlines()


def samples(folder, task):
    return [json.loads(line) for line in (folder / f"harness-{task}.jsonl").read_text("utf-8").splitlines()]


def test_each_task_has_its_metrics_with_value_error_and_interval(compared):
    evaluation = json.loads((compared[0] / "eval.json").read_text())
    for who in ("bundle", "against"):
        of_tasks = evaluation[who]["harness"]["tasks"]
        assert {task: (each["n"], each["shots"], each["version"]) for task, each in of_tasks.items()} == {
            "nano_choice": (12, 0, 1.0),
            "nano_reply": (6, 0, 1.0),
            "nano_whole": (3, 0, 1.0),
        }
        right = [sample[who]["acc"] for sample in samples(compared[0], "nano_choice")]
        acc = of_tasks["nano_choice"]["metrics"]["acc"]
        assert (acc["value"], (acc["low"], acc["high"])) == (sum(right) / 12, wilson(sum(right), 12))
        assert acc["stderr"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 11) ** 0.5)
        assert of_tasks["nano_whole"]["metrics"]["bits_per_byte"]["value"] > 0


def test_two_bundles_are_compared_on_the_same_documents(compared):
    evaluation = json.loads((compared[0] / "eval.json").read_text())
    found = samples(compared[0], "nano_choice")
    ours, theirs = ([bool(sample[who]["acc_norm"]) for sample in found] for who in ("bundle", "against"))
    expected, difference = paired(ours, theirs), evaluation["harness_difference"]["nano_choice"]["acc_norm"]
    assert expected.only_first + expected.only_second > 0
    assert (difference["difference"], difference["p"]) == (expected.difference, expected.p)
    assert (difference["low"], difference["high"]) == (expected.low, expected.high)
    assert "nano_whole" not in evaluation["harness_difference"]  # its figures are no means over documents


def test_every_answer_is_saved(compared):
    (first, *_) = samples(compared[0], "nano_choice")
    assert first["doc"] == question(0)
    assert [choice for _, choice in first["arguments"]] == [f" {choice}" for choice in question(0)["choices"]]
    assert len(first["bundle"]["resps"]) == len(first["against"]["resps"]) == 4
    assert len(samples(compared[0], "nano_reply")) == 6


def test_the_lines_say_what_was_measured(compared, bundles):
    evaluation = json.loads((compared[0] / "eval.json").read_text())
    acc = evaluation["bundle"]["harness"]["tasks"]["nano_choice"]["metrics"]["acc"]
    lines = compared[1]
    interval = f"({acc['low']:.4f} to {acc['high']:.4f})"
    assert lines[0] == f"{bundles[0]}, nano_choice, acc, 0 shots, chance 0.25: {acc['value']:.4f} {interval}, n 12"
    begins = [line.partition(": ")[0] for line in lines]
    assert f"{bundles[0]}, nano_whole, word_perplexity, 0 shots" in begins
    assert f"{bundles[1]}, nano_choice, acc, 0 shots, chance 0.25" in begins
    assert any(line.startswith(f"{bundles[0]} minus {bundles[1]}: nano_choice, acc: ") for line in lines)


def test_limit_and_shots_are_lm_evals(bundles, tasks, tmp_path, capsys):
    words = ["--harness", "nano_choice", "--harness_tasks", str(tasks), "--harness_limit", "3", "--harness_shots", "2"]
    assert cli.main(["eval", str(bundles[0]), *words, "--out", str(tmp_path / "out"), "--json"]) == 0
    of_task = json.loads(capsys.readouterr().out)["bundle"]["harness"]["tasks"]["nano_choice"]
    assert (of_task["n"], of_task["shots"]) == (3, 2)
    (first, *_) = samples(tmp_path / "out", "nano_choice")
    assert first["arguments"][0][0].count("\n\n") == 2


def test_a_dry_run_says_what_would_be_asked(bundles, tasks):
    config = Config(bundle=bundles[0], harness=NAMES, harness_tasks=tasks, harness_limit=5)
    folder = bundles[0].parent / "eval" / "nano_choice-nano_reply-nano_whole"
    assert plan(config) == f"lm-evaluation-harness: nano_choice, nano_reply, nano_whole; into {folder}"


def test_a_group_is_added_up_and_each_way_of_reading_a_reply_has_a_score_of_its_own(bundles, tasks, tmp_path):
    for name in NAMES[:2]:
        (tmp_path / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text())
    summary = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    (tmp_path / "group.yaml").write_text(
        json.dumps({"group": "nano", "task": NAMES[:1], "aggregate_metric_list": [summary]})
    )
    first = {"function": "take_first"}
    word = {"function": "regex", "regex_pattern": "(\\w+)"}
    ways = [{"name": "word", "filter": [word, first]}, {"name": "all", "filter": [first]}]
    write_task(tmp_path, "nano_ways", REPLY | {"filter_list": ways}, [question(number) for number in range(6)])
    both, out = ["nano", "nano_ways"], tmp_path / "out"
    config = Config(bundle=bundles[0], harness=both, harness_tasks=tmp_path, out=out, json=True)
    of_tasks = json.loads(run(config))["bundle"]["harness"]["tasks"]
    group, task = (of_tasks[name]["metrics"]["acc"] for name in ("nano", "nano_choice"))
    assert group["value"] == task["value"]
    assert group["high"] == pytest.approx(group["value"] + Z * group["stderr"])
    metrics = of_tasks["nano_ways"]["metrics"]
    for way in ("word", "all"):
        right = [s["bundle"]["exact_match"] for s in samples(tmp_path / "out", "nano_ways") if s["filter"] == way]
        metric = metrics[f"exact_match,{way}"]
        assert (metric["value"], (metric["low"], metric["high"])) == (sum(right) / 6, wilson(sum(right), 6))


@pytest.mark.parametrize(
    ("value", "stderr", "values", "expected"),
    [
        (0.25, 0.1, [1.0, 0.0, 0.0, 0], wilson(1, 4)),
        (3.0, 0.5, [2.0, 4.0], (3 - Z / 2, 3 + Z / 2)),
        (0.9, 0.1, [0.0, 1.0], (0.9 - Z / 10, 0.9 + Z / 10)),  # between 0 and 1, but not their mean
        (0.5, 0.1, [], (0.5 - Z / 10, 0.5 + Z / 10)),  # of a group
        (12.0, None, [[-3.0, 7]], (None, None)),
    ],
)
def test_the_interval_fits_the_metric(value, stderr, values, expected):
    assert interval(value, stderr, values) == pytest.approx(expected)


# --- suites ---

SUITE = """
tasks:
  plain: {task: nano_choice, metric: acc, shots: 0}
  shown: {task: nano_choice, metric: acc_norm, shots: 2}
  reply: {task: nano_reply, metric: exact_match, settings: {generation_kwargs: {until: [e], max_gen_toks: 4}}}
missing: {lost: nobody has it}
"""


@pytest.fixture(scope="module")
def suite_of_both(bundles, tasks, tmp_path_factory):
    """The folder of an evaluation of a suite, and what it printed."""
    out = tmp_path_factory.mktemp("suite")
    (out / "ours.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "TaskManager", partial(TaskManager, include_defaults=False))
        config = Config(
            bundle=bundles[0],
            against=bundles[1],
            harness=[str(out / "ours.yaml")],
            harness_tasks=tasks,
            out=out,
            dtype="float32",
        )
        return out, run(config).splitlines()


def test_a_suite_is_the_mean_of_its_tasks_above_chance(suite_of_both):
    evaluation = json.loads((suite_of_both[0] / "eval.json").read_text())
    tasks = {"ours", "ours:plain", "ours:shown", "ours:reply", "lost"}
    assert undocumented(evaluation) == tasks | {"acc", "acc_norm", "exact_match"}
    for who in ("bundle", "against"):
        found = evaluation[who]["harness"]
        shots = {task: of_task["shots"] for task, of_task in found["tasks"].items()}
        assert shots == {"ours:plain": 0, "ours:shown": 2, "ours:reply": 0}
        plain = [sample[who]["acc"] for sample in samples(suite_of_both[0], "ours-plain")]
        shown = [sample[who]["acc_norm"] for sample in samples(suite_of_both[0], "ours-shown")]
        reply = [sample[who]["exact_match"] for sample in samples(suite_of_both[0], "ours-reply")]
        centred = [(sum(plain) / 12 - 0.25) / 0.75, (sum(shown) / 12 - 0.25) / 0.75, sum(reply) / 6]
        of_suite = found["suites"]["ours"]
        assert [each["centred"] for each in of_suite["tasks"].values()] == pytest.approx(centred)
        assert of_suite["value"] == pytest.approx(sum(centred) / 3)
        assert of_suite["low"] < of_suite["value"] < of_suite["high"]
        assert of_suite["n"] == 30
    difference = evaluation["suite_difference"]["ours"]
    ours, theirs = (evaluation[who]["harness"]["suites"]["ours"]["value"] for who in ("bundle", "against"))
    assert difference["difference"] == pytest.approx(ours - theirs)


def test_each_task_of_a_suite_is_asked_in_the_way_that_it_says(suite_of_both):
    (plain, *_), (shown, *_) = (samples(suite_of_both[0], name) for name in ("ours-plain", "ours-shown"))
    assert [each["arguments"][0][0].count("\n\n") for each in (plain, shown)] == [0, 2]
    (reply, *_) = samples(suite_of_both[0], "ours-reply")
    assert reply["arguments"][0][1]["max_gen_toks"] == 4


def test_a_part_of_a_suite_is_called_a_part(suite_of_both, bundles):
    suite = json.loads((suite_of_both[0] / "eval.json").read_text())["bundle"]["harness"]["suites"]["ours"]
    part = f"{bundles[0]}, ours (3 of its 4 tasks, without lost), mean above chance (1: all right): "
    interval = f"({suite['low']:.4f} to {suite['high']:.4f})"
    assert f"{part}{suite['value']:.4f} {interval}, n 30" in suite_of_both[1]
    assert suite_of_both[1][-1].startswith(f"{bundles[0]} minus {bundles[1]}: ours, mean above chance: ")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([["a question", " one"], ["a question", " two"], ["a question", " three"]], 3),
        ([["he", " ran"], ["she", " ran"]], 2),  # winogrande: the beginnings differ, the end is one
        ([["a question", " one"], ["a question", " two"], ["", " one"], ["", " two"]], 2),  # acc_mutual_info asks twice
    ],
)
def test_choices_are_counted_however_they_are_asked(arguments, count):
    assert choices_of(arguments) == count


def test_a_mean_that_is_neither_right_nor_wrong_is_compared_document_by_document():
    found = difference([0.5, 1.0, 0.25], [0.0, 1.0, 0.5])
    half = 4.3027 * statistics.stdev([0.5, 0.0, -0.25]) / 3**0.5
    assert found == {
        "difference": pytest.approx(1 / 12),
        "n": 3,
        "low": pytest.approx(1 / 12 - half),
        "high": pytest.approx(1 / 12 + half),
    }


# --- mistakes ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", "nano_choise"], "has no task 'nano_choise'; did you mean nano_choice?"),
        (["--harness", "qqq"], "has no task 'qqq'; see `lm_eval ls tasks`"),
        (
            ["--harness", "nano_hub"],
            "the task nano_hub cannot be opened: ConnectionError: Couldn't reach 'nobody/none'",
        ),
        (["--harness", "nano_choice", "--harness_shots", "99"], "at most the 12 examples of nano_choice, got 99"),
        (
            ["--harness", "core", "--harness_shots", "1"],
            "--harness_shots does not go with core: its tasks have shots",
        ),
        (["--harness", "cores"], "has no task 'cores'; did you mean core?"),
        (["--harness", "wrong.yaml"], "wrong asks nano_choice for f1; its means are acc, acc_norm"),
        (["--harness", "many.yaml"], "at most the 12 examples of many:a, got 99"),
        (["--harness", "group.yaml"], "nano_both of the suite group is a group of tasks; name"),
        (["--harness", "nano_choice", "--harness_limit", "0"], "--harness_limit must be at least 1, got 0"),
        (["--harness", "nano_choice", "--harness_shots", "-1"], "--harness_shots must be at least 0, got -1"),
        (["--text", "a.txt"], "--harness_limit and --harness_shots need --harness"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_a_model_is_loaded(bundles, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("nanollm.stages.eval.load_bundle", pytest.fail)
    write_tasks(tmp_path)
    (tmp_path / "nano_both.yaml").write_text('{"group": "nano_both", "task": ["nano_choice", "nano_reply"]}')
    monkeypatch.chdir(tmp_path.parent)
    for name, row in (
        ("wrong", "task: nano_choice, metric: f1"),
        ("many", "task: nano_choice, metric: acc, shots: 99"),
        ("group", "task: nano_both, metric: acc"),
    ):
        (tmp_path.parent / f"{name}.yaml").write_text(f"tasks: {{a: {{{row}}}}}")
    write_task(tmp_path, "nano_hub", CHOICE | {"dataset_path": "nobody/none", "dataset_kwargs": {}}, [])
    assert cli.main(["eval", str(bundles[0]), *words, "--harness_tasks", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


def test_a_folder_of_tasks_that_is_none_is_refused(bundles, tmp_path):
    with pytest.raises(ValueError, match=r"--harness_tasks .*nowhere is not a folder"):
        run(Config(bundle=bundles[0], harness=NAMES, harness_tasks=tmp_path / "nowhere"))
