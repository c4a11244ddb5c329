"""Conversations with an environment: only what the model said is trained, and its partner may fail."""

import dataclasses
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanollm.evals.problems import judge, solve
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import ToolCaller, check_tools
from nanollm.generate.turns import MAX_TURNS, Turns
from nanollm.model.transformer import Transformer
from nanollm.rl.reward import RewardConfig, RewardInput, Rewards
from nanollm.rl.rollout import RolloutConfig, roll_out
from nanollm.sources.environments import GuessTheNumber
from nanollm.sources.gsm8k import Problem
from nanollm.sources.tasks import TaskConfig, environments_of
from nanollm.text.chat import Conversation, Message, encode_conversation, transcript
from nanollm.text.tokenizer import ASSISTANT, END, USER
from tests.model.conftest import TINY

TASK = GuessTheNumber(3)
DOCS = Path(__file__).parents[2] / "docs"


def saying(answer):
    """An environment that always does the same."""

    class Same:
        def step(self, reply):
            if isinstance(answer, Exception):
                raise answer
            return answer

    return Same()


def say(turns, text):
    """Tell a message token by token; returns what follows it."""
    tokenizer = turns.tokenizer
    assert not any(turns(token) for token in tokenizer.encode(text))
    return turns(tokenizer.mark_id(END))


def test_a_conversation_has_the_ids_that_training_on_it_would_give(tokenizer):
    turns = Turns(TASK.environment(Problem("", "7")), tokenizer)
    ids = [*tokenizer.encode("5"), tokenizer.mark_id(END), *say(turns, "5")]
    whole = Conversation((Message("user", "?"), Message("assistant", "5"), Message("user", "higher")))
    expected = [*encode_conversation(whole, tokenizer).ids, tokenizer.mark_id(ASSISTANT)]
    assert expected[-len(ids) :] == ids
    assert not say(turns, "7")
    assert turns.outcome == 1
    assert transcript([*ids, *tokenizer.encode("7")], tokenizer) == "5\n> higher\n7"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (0.25, 0.25),
        (True, 1.0),
        (float("nan"), "returned nan, expected a message or a finite number"),
        (None, "returned None, expected a message or a finite number"),
        ("", "returned '', expected a message or a finite number"),
        (OSError("no net"), "raised OSError: no net"),
    ],
    ids=str,
)
def test_what_an_environment_returns_is_the_reward_or_a_fault(tokenizer, answer, outcome):
    turns = Turns(saying(answer), tokenizer)
    assert not say(turns, "hello")
    assert turns.outcome == outcome
    reply = RewardInput("hello", 2, True, turns.outcome)
    with Rewards(RewardConfig(), TASK, 8) as rewards:
        (reward,) = rewards([(Problem("", ""), reply)])
    assert reward.total == (outcome if isinstance(outcome, float) else 0)
    assert rewards.faults.total() == isinstance(outcome, str)


def test_an_environment_that_never_ends_is_left_after_some_turns(tokenizer):
    turns = Turns(saying("go on"), tokenizer)
    assert all(say(turns, "hello") for _ in range(MAX_TURNS - 1))
    assert not say(turns, "hello")
    assert turns.outcome == 0


def test_a_message_that_spells_marks_cannot_begin_another(tokenizer):
    marks = {tokenizer.mark_id(mark) for mark in (USER, ASSISTANT, END)}
    user, *message, end, assistant = say(Turns(saying(f"{END}{ASSISTANT}9"), tokenizer), "1")
    assert {user, end, assistant} == marks
    assert not marks & {*message}


def test_tools_write_into_each_message_and_the_environment_hears_them(tokenizer):
    heard = []

    class Listens:
        def step(self, reply):
            heard.append(reply)
            return "and again"

    turns = Turns(Listens(), tokenizer, partial(ToolCaller, check_tools(["calculator"], tokenizer), tokenizer))
    for _ in range(2):
        given = [turns(token) for token in tokenizer.encode("<<5*3=")]
        assert given[-1] == tokenizer.encode("15>>")
        turns(tokenizer.mark_id(END))
    assert heard == ["<<5*3=15>>"] * 2


def test_the_environment_of_the_documents_spells(tokenizer):
    text = (DOCS / "howto" / "own-task.md").read_text(encoding="utf-8")
    names = {"Problem": Problem}
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "environment" in block)
    exec(block, names)
    task = names["Spelling"]()
    turns = Turns(task.environment(task.problems("train")[0]), tokenizer)
    for letter in "ca":
        assert say(turns, letter)
    assert not say(turns, "t")
    assert turns.outcome == 1
    assert environments_of(task)


@pytest.mark.parametrize("largest", [1, 10**6 + 1])
def test_a_number_that_cannot_be_guessed_is_refused(largest):
    with pytest.raises(ValueError, match=r"task.largest must be from 2 to 1,000,000 for guess, got"):
        TaskConfig(name="guess", largest=largest)


def played(problem, draw):
    """A conversation with guesses by chance, which in one game of four listen to the last hint."""
    partner, answer, messages = TASK.environment(problem), "", [Message("user", problem.question)]
    listens = draw.random() < 0.25
    while isinstance(answer, str):
        heard = {"": 2, "higher": 3, "lower": 1}[answer]
        guess = str(heard if listens else draw.randint(1, TASK.largest))
        messages.append(Message("assistant", guess))
        answer = partner.step(guess)
        if isinstance(answer, str):
            messages.append(Message("user", answer))
    return Conversation(tuple(messages))


@pytest.fixture(scope="module")
def player(tokenizer):
    """Weights of a tiny model that has seen such games: it guesses numbers, and seldom listens."""
    model = Transformer(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)).init(0)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    for _ in range(100):
        games = [encode_conversation(played(draw.choice(TASK.problems("train")), draw), tokenizer) for _ in range(16)]
        ids = pad_sequence([torch.tensor(game.ids) for game in games], batch_first=True)
        trained = pad_sequence([torch.tensor(game.trained) for game in games], batch_first=True)[:, 1:]
        loss = F.cross_entropy(model(ids[:, :-1])[trained], ids[:, 1:][trained])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def make_player(make_learner, player):
    """A learner that begins with this model."""

    def make(**changes):
        learner = make_learner(task=TASK, rollout=RolloutConfig(max_tokens=40, **changes))
        learner.state.model.load_state_dict(player)
        return learner

    return make


def test_each_conversation_of_a_crowd_is_the_one_that_it_is_alone(make_player):
    learner, problems = make_player(group_size=3), TASK.problems("train")
    model, tokenizer, c = learner.state.whole_model(), learner.tokenizer, learner.collector.c
    user, end = tokenizer.mark_id(USER), tokenizer.mark_id(END)
    hints = 0
    for number, rollout in enumerate(
        each for group in roll_out(model, tokenizer, problems, c, 7, None, TASK.environment) for each in group.rollouts
    ):
        turns = Turns(TASK.environment(problems[number // 3]), tokenizer)
        (alone,) = generate(
            model,
            [rollout.prompt_ids],
            SamplingConfig(temperature=1.0),
            max_tokens=40,
            stop_token_ids=turns.ends,
            seed=7 + number,
            tool=lambda turns=turns: turns,
        )
        assert rollout.reply_ids[: len(alone.ids)] == alone.ids
        assert rollout.outcome == turns.outcome
        where = [place for place, token in enumerate(rollout.reply_ids) if token == user]
        assert all(rollout.reply_ids[place - 1] == end and rollout.is_sampled[place - 1] for place in where)
        assert not any(rollout.is_sampled[place] for place in where)
        hints += len(where)
    assert hints > len(problems)


def test_a_step_trains_on_conversations_and_repeats_to_the_bit(make_player):
    def weights():
        learner = make_player(prompts=4, group_size=4)
        taken = learner.step(0)
        assert taken.numbers["sampling/sampling_logp_difference/max"] < 1e-4
        return torch.cat([p.detach().flatten() for p in learner.state.model.parameters()])

    assert torch.equal(weights(), weights())


def test_an_evaluation_asks_the_environment(make_player):
    learner, problems = make_player(), TASK.problems("test") * 5
    model, tokenizer = learner.state.whole_model(), learner.tokenizer
    ask = partial(solve, model, tokenizer, problems, SamplingConfig(temperature=1.0), max_tokens=40)
    attempts = ask(environment=TASK.environment)
    right = judge(attempts, {"correct": None}).first("correct")
    assert right == [each.outcomes[0] == 1 for each in attempts]
    assert right == [each.replies[0].splitlines()[-1] == each.problem.answer for each in attempts]
    assert 0 < sum(right) < len(problems)


@pytest.mark.long
def test_a_model_learns_to_listen(make_player):
    """Two guesses by chance find one of three numbers in 5 of 9 games; who begins with 2 and listens, in all. The
    model has seen such games, one in four."""
    learner = make_player(prompts=3, group_size=32)
    learner.lr = 1e-3
    rates = [learner.step(step).reward for step in range(60)]
    assert sum(rates[:3]) / 3 < 0.75
    assert sum(rates[-5:]) / 5 > 0.85
