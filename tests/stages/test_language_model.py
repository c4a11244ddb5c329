"""Two lines of Python say what the command line and the engine say."""

import json
import math

import pytest

import nanollm
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.stages.generate import Config, run
from nanollm.text.tokenizer import ASSISTANT, END, USER

ASKED = ["Who is it?", "What does the fox do?", "No"]


@pytest.fixture(scope="module")
def model(bundle):
    return nanollm.load(bundle, dtype="float32")


@pytest.mark.parametrize("is_chat", [True, False])
def test_one_text_a_batch_a_stream_and_the_verb_say_the_same(model, bundle, is_chat):
    say = model.chat if is_chat else model.generate
    settings = {"max_tokens": 12, "temperature": 0.9, "top_k": 40}
    alone = [say(asked, seed=5 + i, **settings) for i, asked in enumerate(ASKED)]
    assert len({*alone}) == 3
    assert say(ASKED, seed=5, **settings) == alone
    assert ["".join(model.stream(asked, seed=5 + i, is_chat=is_chat, **settings)) for i, asked in enumerate(ASKED)] == (
        alone
    )
    verb = run(Config(bundle=bundle, prompt=ASKED, chat=is_chat, seed=5, dtype="float32", json=True, **settings))
    assert [json.loads(line)["text"] for line in verb.splitlines()] == alone


def test_messages_are_read_as_a_conversation(model):
    mark, encode = model.tokenizer.mark_id, model.tokenizer.encode
    ids = [model.tokenizer.bos_id]
    for role, text in ((USER, "Who?"), (ASSISTANT, "I."), (USER, "Who else?")):
        ids += [mark(role), *encode(text), mark(END)]
    (expected,) = generate(
        model.bundle.model,
        [[*ids, mark(ASSISTANT)]],
        SamplingConfig(temperature=0),
        max_tokens=8,
        stop_token_ids=frozenset(),
    )
    spoken = [("user", "Who?"), ("assistant", "I."), ("user", "Who else?")]
    messages = [{"role": role, "content": text} for role, text in spoken]
    reply = model.chat(messages, temperature=0, max_tokens=8)
    assert model.tokenizer.decode_drawn(expected.ids).startswith(reply)
    assert reply
    assert model.chat([messages, "No"], temperature=0, max_tokens=8)[0] == reply
    with pytest.raises(ValueError, match="behind each call comes one message of the tool, and nowhere else"):
        model.chat([*messages, {"role": "tool", "content": "5"}])


def test_a_stop_text_ends_a_stream_as_it_ends_a_reply(model):
    whole = model.generate("The", max_tokens=20, seed=1)
    stop = [whole[4:6]]
    cut = model.generate("The", max_tokens=20, seed=1, stop=stop)
    assert cut == whole[: whole.index(stop[0])]
    assert "".join(model.stream("The", is_chat=False, max_tokens=20, seed=1, stop=stop)) == cut


def test_log_probabilities_are_those_of_the_tokens_behind_each_other(model):
    told = model.logprobs("The fox sleeps.")
    ids = model.tokenizer.encode("The fox sleeps.")
    assert [text for text, _ in told] == [model.tokenizer.pieces[token].text for token in ids]
    for place in (0, len(ids) - 1):
        (drawn,) = generate(
            model.bundle.model,
            [[model.tokenizer.bos_id, *ids[:place]]],
            SamplingConfig(temperature=1.0, logit_bias={ids[place]: 1e4}),
            max_tokens=1,
            stop_token_ids=frozenset(),
        )
        assert drawn.ids == [ids[place]]
        assert told[place][1] == pytest.approx(drawn.logprobs[0], abs=1e-5)
    assert all(-math.inf < each < 0 for _, each in told)
    assert model.logprobs("") == []
    with pytest.raises(ValueError, match="the model's context is 32"):
        model.logprobs("word " * 40)


def test_a_schema_holds_in_replies_continuations_and_streams(model):
    pytest.importorskip("llguidance", reason='llguidance is not installed: pip install -e ".[serve]"')
    schema, settings = {"enum": [{"a": 1}, {"a": 22}]}, {"seed": 3, "max_tokens": 30}
    reply = model.chat("Who?", schema=schema, **settings)
    assert json.loads(reply) in schema["enum"]
    assert json.loads(model.generate(["The"], schema=schema)[0]) in schema["enum"]
    assert "".join(model.stream("Who?", schema=schema, **settings)) == reply
