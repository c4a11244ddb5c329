"""A suite is the mean of its tasks above chance, a part of one is called a part, and what makes no sense is refused."""

import pytest

from nanollm.evals.stats import Mean, average, wilson

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')

from nanollm.evals.benchmarks import SUITES, read_suite, suite_names

TASKS = """
tasks:
  easy: {task: one, metric: acc, shots: 0}
  again: {task: one, metric: acc, shots: 5}
  reply: {task: two, metric: exact_match}
  given: {task: three, metric: acc, chance: 0.6}
missing:
  lost: nobody has it
"""
CHANCE = {"easy": 0.25, "again": 0.25, "reply": None, "given": 0.5}
CORRECT = {"easy": 40, "again": 25, "reply": 10, "given": 70}


@pytest.fixture
def ours(tmp_path):
    (tmp_path / "ours.yaml").write_text(TASKS)
    return read_suite(str(tmp_path / "ours.yaml"))


def measured(correct):
    """Figures of tasks as evals/benchmarks.py gives them, each of 100 documents."""
    found = {}
    for name, count in correct.items():
        low, high = wilson(count, 100)
        metric = "exact_match" if name == "reply" else "acc"
        figure = {"value": count / 100, "stderr": None, "low": low, "high": high}
        found[f"ours:{name}"] = {"n": 100, "chance": CHANCE[name], "metrics": {metric: figure}}
    return found


def test_each_accuracy_counts_by_how_far_it_lies_above_chance(ours):
    score = ours.score(measured(CORRECT))
    centred = {"easy": 0.15 / 0.75, "again": 0.0, "reply": 0.1, "given": 0.1 / 0.4}
    assert {name: of_task["centred"] for name, of_task in score["tasks"].items()} == pytest.approx(
        {f"ours:{name}": value for name, value in centred.items()}
    )
    assert [of_task["chance"] for of_task in score["tasks"].values()] == [0.25, 0.25, 0.0, 0.6]
    assert score["value"] == pytest.approx((0.2 + 0.0 + 0.1 + 0.25) / 4)
    assert score["n"] == 400


def test_chance_scores_nothing_and_everything_right_scores_one(ours):
    assert ours.score(measured({"easy": 25, "again": 25, "reply": 0, "given": 60}))["value"] == pytest.approx(0)
    assert ours.score(measured(dict.fromkeys(CORRECT, 100)))["value"] == pytest.approx(1)


def test_the_same_documents_asked_twice_are_not_taken_for_twice_as_many(ours):
    score = ours.score(measured(CORRECT))
    one, again, two, three = (
        Mean(CORRECT[name] / 100, *wilson(CORRECT[name], 100)).scaled(zero, 1)
        for name, zero in (("easy", 0.25), ("again", 0.25), ("reply", 0), ("given", 0.6))
    )
    expected = average([[one, again], [two], [three]])
    assert (score["low"], score["high"]) == pytest.approx((expected.low, expected.high))
    apart = average([[one], [again], [two], [three]])
    assert score["high"] - score["low"] > apart.high - apart.low


def test_the_difference_of_two_models_is_that_of_their_scores(ours):
    first, second = measured(CORRECT), measured({"easy": 30, "again": 30, "reply": 0, "given": 80})
    differences = {}
    for task, figures in first.items():
        for metric, figure in figures["metrics"].items():
            value = figure["value"] - second[task]["metrics"][metric]["value"]
            differences[task] = {metric: {"difference": value, "low": value - 0.1, "high": value + 0.2}}
    found = ours.difference(first, differences)
    assert found["difference"] == pytest.approx(ours.score(first)["value"] - ours.score(second)["value"])
    down = ((0.1 / 0.75 * 2) ** 2 + 0.1**2 + (0.1 / 0.4) ** 2) ** 0.5 / 4
    assert found["low"] == pytest.approx(found["difference"] - down)


def test_core_says_where_it_comes_from_and_has_its_22_tasks_but_two():
    core = read_suite("core")
    assert (len(core.members), list(core.missing)) == (20, ["jeopardy", "squad"])
    assert "arXiv:2406.11794" in (SUITES / "core.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", suite_names())
def test_lm_eval_has_every_task_of_our_suites_with_its_metric(name):
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    for member in read_suite(name).members.values():
        metrics = load_yaml(index[member.task].yaml_path, resolve_func=False)["metric_list"]
        assert member.metric in [each["metric"] for each in metrics], member.task
    assert (
        not {"jeopardy", "squad", *suite_names()} & index.keys()
    )  # what is missing is, and no name hides one of theirs


@pytest.mark.parametrize("text", ["a: 1", "tasks: [one]", "tasks: {a: {task: one}}", "tasks: {a: {task: b, shot: 1}}"])
def test_a_file_that_is_no_suite_is_refused(tmp_path, text):
    (tmp_path / "ours.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"ours.yaml is not a suite .*; expected tasks, such as tasks: {mine: {task"):
        read_suite(str(tmp_path / "ours.yaml"))


def test_a_suite_that_does_not_exist_is_refused():
    with pytest.raises(FileNotFoundError, match=r"--harness nowhere\.yaml does not exist; it should be a suite"):
        read_suite("nowhere.yaml")
