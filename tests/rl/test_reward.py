"""Rewards are what their names say, and a function of one's own can do no harm."""

import sys
import time
from dataclasses import replace

import psutil
import pytest

from nanollm.rl import sandbox
from nanollm.rl.reward import RewardConfig, RewardInput, Rewards, overlong, well_formed
from nanollm.rl.sandbox import MAX_TIMEOUTS
from nanollm.sources.gsm8k import Problem
from tests.rl.conftest import EndsSoon

PROBLEM = Problem("How many?", "#### 3")

OWN = """
import math, os, time

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")

def vowels(problem, reply):
    return sum(map(reply.count, "aeiou")) / 10

def faulty(problem, reply):
    match reply:
        case "raise": raise RuntimeError("two\\nlines")
        case "nan": return math.nan
        case "text": return "much"
        case "exit": os._exit(3)
        case "leave": raise SystemExit(0)
        case "mute": raise Mute
        case "block":
            while True: pass
    return 0.5

def penalty(problem, reply):
    print("this is not the result of the run")
    if reply == "raise":
        raise TimeoutError("mine")
    return -len(reply)

def blocks(problem, reply):
    time.sleep(60)

def trl(prompts, completions, completion_ids, level, answer, **columns):
    assert prompts == ["How many?"] * 3 and answer == ["#### 3"] * 3 and level == ["hard"] * 3
    longest = max(map(len, completions))  # the whole group
    return [None if not done else len(text) / longest + len(ids) for text, ids, done in zip(
        completions, completion_ids, columns["ended"])]

def trl_faulty(completions, **columns):
    if "exit" in completions:
        os._exit(3)
    return [1.0]

def process(problem, reply):
    time.sleep(0.02)
    return os.getpid()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of somebody else's, in the current folder."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "WORKERS", 2)  # each has to start
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def totals(weights, texts, **changes):
    with Rewards(RewardConfig(weights=weights, **changes), EndsSoon(), max_tokens=40) as rewards:
        got = rewards([(PROBLEM, RewardInput(text, 9, ended=True)) for text in texts])
        return [reward.total for reward in got], rewards.faults


def test_parts_are_weighed_and_added():
    with Rewards(RewardConfig(weights={"correct": 1.0, "format": 0.25, "length": 2.0}), EndsSoon(), 40) as rewards:
        (reward,) = rewards([(PROBLEM, RewardInput("1\n#### 3", 36, ended=True))])
    assert reward.parts == {"correct": 1.0, "format": 1.0, "length": -0.875}
    assert reward.total == 1.0 + 0.25 - 1.75


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so\n#### 3", 1),
        ("#### 3", 1),
        ("#### 3\n", 1),
        ("so #### 3", 0),  # not a line of its own
        ("#### 3\nso", 0),
        ("#### 2\n#### 3", 0),
        ("#### three", 0),
        ("####", 0),
        ("", 0),
    ],
)
def test_the_format_is_one_answer_in_the_last_line(text, expected):
    assert well_formed(RewardInput(text, 5, ended=True)) == expected
    assert well_formed(RewardInput(text, 5, ended=False)) == 0


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0), (30, 0), (35, -0.5), (40, -1)])
def test_long_replies_lose_little_by_little(tokens, expected):
    assert overlong(RewardInput("", tokens, ended=True), 40, 10) == expected
    assert overlong(RewardInput("", tokens, ended=False), 40, 10) == -1


def test_a_function_of_ones_own_is_a_part_like_any_other(own):
    got, faults = totals({f"{own}:vowels": 10.0, "correct": 1.0}, ["aabb", "xyz"])
    assert got == [2.0 + 1.0, 0.0]
    assert not faults


def test_a_function_in_trls_form_sees_columns_ids_and_the_whole_group(own):
    problem, twin = (replace(PROBLEM, columns={"level": "hard"}) for _ in range(2))
    replies = [RewardInput(text, 2, ended, ids=[7, 8]) for text, ended in (("aa", True), ("b", True), ("c", False))]
    weights = {f"{own}:trl": 1.0}
    with Rewards(RewardConfig(weights=weights), EndsSoon(), max_tokens=40) as rewards:
        got = rewards([(each, reply) for each in (problem, twin) for reply in replies])
    assert [reward.total for reward in got] == [3.0, 2.5, 0.0] * 2
    assert not rewards.faults


def test_a_function_in_trls_form_that_fails_costs_its_group_alone(own):
    got, faults = totals({f"{own}:trl_faulty": 1.0}, ["exit", "fine"])
    assert got == [0.0, 0.0] and faults == {f"{own}:trl_faulty ended its process": 2}
    got, faults = totals({f"{own}:trl_faulty": 1.0}, ["fine", "fine"])
    assert faults == {f"{own}:trl_faulty raised ValueError: 1 rewards for 2 completions": 2}


def test_a_function_that_fails_costs_its_reply_the_part_and_nothing_else(own):
    texts = ["fine", "raise", "nan", "text", "exit", "leave", "mute", "block", "fine"]
    got, faults = totals({f"{own}:faulty": 1.0}, texts, timeout_s=4.0)
    assert got == [0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]
    name = f"{own}:faulty"
    assert dict(faults) == {
        f"{name} raised RuntimeError: two lines": 1,
        f"{name} returned nan": 1,
        f"{name} returned 'much'": 1,
        f"{name} ended its process": 1,
        f"{name} raised SystemExit: 0": 1,
        f"{name} raised Mute": 1,
        f"{name} took longer than 4.0 s": 1,
    }


def test_a_function_that_always_blocks_is_asked_a_few_times_only(own):
    got, faults = totals({f"{own}:blocks": 1.0}, ["x"] * 50, timeout_s=0.1)
    assert got == [0.0] * 50
    assert faults[f"{own}:blocks took longer than 0.1 s"] == MAX_TIMEOUTS
    assert faults.total() == 50


def test_many_replies_are_judged_at_once(own):
    got, _ = totals({f"{own}:process": 1.0}, ["x"] * 40)
    assert len(set(got)) > 1


def test_a_task_that_cannot_grade_is_counted():
    class Broken(EndsSoon):
        def grade(self, problem, reply):
            raise KeyError("no key")

    with Rewards(RewardConfig(), Broken(), 40) as rewards:
        assert [reward.total for reward in rewards([(PROBLEM, RewardInput("x", 1, ended=True))])] == [0.0]
    assert dict(rewards.faults) == {"correct raised KeyError: 'no key'": 1}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "reward.weights is no_such_module:f .*No module named 'no_such_module'"),
        ("math:nothing", "reward.weights is math:nothing .*'math' has no attribute 'nothing'"),
        ("math:pi", "math:pi is float, expected a function"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_before_anything_is_sampled(path, message):
    with pytest.raises(ValueError, match=message):
        Rewards(RewardConfig(weights={path: 1.0}), EndsSoon(), 40)


def test_failing_does_not_pay(own):
    """Where a part is a penalty, 0 would be its best value."""
    with Rewards(RewardConfig(weights={f"{own}:penalty": 1.0}), EndsSoon(), 40) as rewards:
        got = rewards([(PROBLEM, RewardInput(text, 1, ended=True)) for text in ("long text", "raise", "short")])
    assert [reward.total for reward in got] == [-9, -9, -5]
    with Rewards(RewardConfig(weights={f"{own}:penalty": -1.0}), EndsSoon(), 40) as rewards:
        got = rewards([(PROBLEM, RewardInput(text, 1, ended=True)) for text in ("long text", "raise", "short")])
    assert [reward.total for reward in got] == [9, 0, 5]


def test_a_process_that_is_killed_while_it_waits_is_replaced(own):
    with Rewards(RewardConfig(weights={f"{own}:vowels": 10.0}), EndsSoon(), 40) as rewards:
        assert rewards([(PROBLEM, RewardInput("aa", 1, ended=True))])[0].total == 2
        for child in psutil.Process().children(recursive=True):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
        time.sleep(0.5)
        got = [rewards([(PROBLEM, RewardInput("aa", 1, ended=True))])[0].total for _ in range(3)]
    assert got[-1] == 2
