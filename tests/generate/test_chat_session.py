"""A conversation goes on turn by turn, and the model sees what was said, as far as it fits."""

import re
from dataclasses import replace
from itertools import accumulate

import pytest

from nanollm.bundle import Bundle
from nanollm.generate.chat_session import ChatConfig, ChatReply, ChatSession
from nanollm.generate.request import Completion, Request
from nanollm.model.transformer import Transformer
from nanollm.text.chat import Conversation, Message, encode_prompt
from nanollm.text.tokenizer import END
from tests.stages.conftest import MODEL

LONG = replace(MODEL, context_length=128)


@pytest.fixture(scope="module")
def bundle(tokenizer):
    return Bundle(Transformer(LONG).init(0), tokenizer, {})


@pytest.fixture
def session(bundle):
    return ChatSession(
        bundle, ChatConfig(max_tokens=8, logit_bias={3: -100.0, 7: -100.0})
    )  # a reply does not end by itself


def ask(session, question, **more):
    """What was said, and the pieces in which it appeared."""
    pieces = []
    session.reply(question, session.prompt(question), pieces.append, **more)
    return "".join(pieces)


def contents(session):
    return [message.content for message in session.messages]


def test_the_model_sees_the_system_message_and_all_turns(session, tokenizer):
    session.c = replace(session.c, system="Be kind.")
    first, second = ask(session, "Who?"), ask(session, "Why?")
    assert contents(session) == ["Who?", first, "Why?", second]
    turns = [Message("system", "Be kind."), *session.messages, Message("user", "How?")]
    assert session.prompt("How?") == encode_prompt(Conversation(tuple(turns)), tokenizer)
    assert session.conversation() == Conversation(tuple(turns[:-1]))


def test_a_turn_reads_again_only_what_is_new_and_says_what_a_new_start_would_say(session, bundle):
    ask(session, "Once upon a time there was a king who had a daughter")
    before = session.engine.reused_tokens
    fresh = ChatSession(bundle, session.c)
    fresh.messages, fresh.replies = list(session.messages), session.replies
    assert ask(session, "And then?") == ask(fresh, "And then?")
    assert session.engine.reused_tokens > before
    assert fresh.engine.reused_tokens == 0


def test_the_oldest_exchanges_are_forgotten_by_the_model_and_that_is_said(session, capsys):
    session.c = replace(session.c, system="Be kind.")
    questions = [f"What of {number}?" for number in range(8)]
    for question in questions:
        assert len(session.prompt(question)) <= LONG.context_length - 8
        ask(session, question)
    assert contents(session)[::2] == questions  # they stay in the conversation
    assert session.forgotten > 0
    text = session.bundle.tokenizer.decode(session.prompt("Last?"))
    assert text.startswith("Be kind.") and text.endswith("Last?")
    assert questions[0] not in text and questions[7] in text
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "the model forgot the oldest exchange: its context is 128 tokens"
    assert len(said) == session.forgotten // 2
    session.prompt("word " * 20)
    assert re.match(r"the model forgot the oldest \d exchanges: its context is 128", capsys.readouterr().err)


def test_a_message_that_does_not_fit_even_alone_is_refused_and_nothing_is_forgotten(session):
    ask(session, "Who?")
    with pytest.raises(ValueError, match="the model's context is 128 and a reply needs at least one"):
        session.prompt("word " * 200)
    assert session.forgotten == 0
    long = "word " * 30
    assert len(session.prompt(long)) > 96  # more than leaves room for a quarter of the context, but it fits
    ask(session, long)


def test_a_reply_without_words_is_no_part_of_the_conversation(session, capsys):
    session.c = replace(session.c, logit_bias={session.bundle.tokenizer.mark_id(END): 100.0})
    assert ask(session, "Who?") == ""
    assert session.messages == []
    assert "the model said nothing, so this message is left out" in capsys.readouterr().err


def test_a_reply_that_is_taken_back_is_drawn_anew(session):
    ask(session, "Who?")
    first = ask(session, "Why?")
    question = session.retract()
    assert question == "Why?"
    assert contents(session)[-1] != first and len(session.messages) == 2
    assert ask(session, question) != first


def test_without_a_message_nothing_can_be_taken_back(session):
    with pytest.raises(ValueError, match="there is no message yet"):
        session.retract()


def test_an_interrupted_reply_stays_as_far_as_it_came(session):
    told = []

    def is_interrupted():
        told.append(None)
        return len(told) > 4

    session.c = replace(session.c, max_tokens=100)
    said = ask(session, "Who?", is_interrupted=is_interrupted)
    assert contents(session) == ["Who?", said]
    assert not session.engine.has_work


def test_reply_i_draws_from_seed_plus_i(bundle, session):
    first, second = ask(session, "Who?"), ask(session, "Why?")
    other = ChatSession(bundle, replace(session.c, seed=1))
    other.messages = session.messages[:2]
    assert ask(other, "Why?") == second
    assert ask(ChatSession(bundle, session.c), "Who?") == first


def test_a_stop_text_across_token_borders_ends_the_reply_and_is_never_shown(bundle, session):
    session.c = replace(session.c, max_tokens=40)
    pieces = []
    session.reply("Who?", session.prompt("Who?"), pieces.append)
    appeared = list(accumulate(pieces))  # the text after each token
    free = appeared[-1]
    stops = [free[len(text) - 1 : len(text) + 1] for text in appeared[3:] if len(text) < len(free)]  # two tokens' ends
    stopped, heard = ChatSession(bundle, replace(session.c, stop=stops[:1])), []
    reply = stopped.reply("Who?", stopped.prompt("Who?"), heard.append)
    assert "".join(heard) == contents(stopped)[-1] == free.partition(stops[0])[0]
    assert reply.completion.finish == "stop"
    assert len(reply.completion.ids) == 1 + next(place for place, text in enumerate(appeared) if stops[0] in text)


@pytest.mark.parametrize(
    ("tokens", "finish", "expected"),
    [
        (0, "cancelled", "0 tokens, stopped"),
        (1, "end", "1 token, first after 250 ms"),
        (5, "end", "5 tokens, 2 tokens/s, first after 250 ms"),
        (9, "length", "9 tokens, 4 tokens/s, first after 250 ms, cut at max_tokens"),
        (5, "length", "5 tokens, 2 tokens/s, first after 250 ms, cut at the end of the context"),
    ],
)
def test_figures_tell_how_fast_it_was_and_why_it_ended(tokens, finish, expected):
    completion = Completion(Request(prompt=[1], max_tokens=9), logprobs=[0.0] * tokens, finish=finish)
    assert ChatReply(completion, first_s=0.25, rest_s=2.0).figures() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"system": " "}, "the system message needs at least one character"),
        ({"stop": [""]}, "a stop text needs at least one character"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(**settings)
