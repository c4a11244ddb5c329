"""OpenAI's own client gets what it asks for."""

import itertools

import pytest

from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.text.chat import Conversation, encode_prompt, reply_borders
from tests.serve.running import MODEL_NAME, serving

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install openai")

QUESTION = [{"role": "user", "content": "Once upon a time?"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **settings):
    defaults = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**defaults | settings)


def complete(client, **settings):
    defaults = {"model": MODEL_NAME, "prompt": "The", "max_tokens": 12, "temperature": 0}
    return client.completions.create(**defaults | settings)


def alone(bundle, prompt, stop_token_ids, max_tokens=12):
    """What the engine says to one prompt at temperature 0 when nobody else asks."""
    sampling = SamplingConfig(temperature=0)
    (completion,) = generate(bundle.model, [prompt], sampling, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
    return completion


def test_a_chat_is_answered_with_what_the_engine_says(client, bundle):
    answer = chat(client)
    prompt = encode_prompt(Conversation.of(QUESTION[0]["content"]), bundle.tokenizer)
    expected = alone(bundle, prompt, reply_borders(bundle.tokenizer))
    (choice,) = answer.choices
    assert choice.message.content == bundle.tokenizer.decode_drawn(expected.ids)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == {"length": "length", "end": "stop"}[expected.finish]
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.ids)
    assert answer.usage.total_tokens == len(prompt) + len(expected.ids)
    assert answer.model == MODEL_NAME


def test_a_stream_marks_what_a_tool_gave_and_is_the_same_reply(bundle, serve_extra):
    """By a field of its own beside those of OpenAI, which other clients pass over."""
    given = "15>>"

    def make_tool():
        tokens = itertools.count(1)
        return lambda token: bundle.tokenizer.encode(given) if next(tokens) == 3 else []

    with serving(bundle) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        running.service.make_tools[MODEL_NAME] = make_tool
        at_once = chat(client).choices[0].message.content
        chunks = [chunk.choices[0] for chunk in chat(client, stream=True)]
    marked = [choice.delta.content for choice in chunks if getattr(choice, "given", False)]
    assert "".join(marked) == given
    assert "".join(choice.delta.content or "" for choice in chunks) == at_once


def test_a_stream_joined_is_the_answer_at_once(client):
    at_once = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert all(entry.token == entry.top_logprobs[0].token for entry in at_once.logprobs.content)  # at temperature 0
    text, tokens, reasons, roles = "", [], [], []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        (choice,) = chunk.choices
        roles.append(choice.delta.role)
        text += choice.delta.content or ""
        tokens += choice.logprobs.content if choice.logprobs else []
        reasons.append(choice.finish_reason)
    assert text == at_once.message.content
    assert [entry.token for entry in tokens] == [entry.token for entry in at_once.logprobs.content]
    assert reasons[-1] == at_once.finish_reason
    assert set(reasons[:-1]) == {None}
    assert roles[0] == "assistant" and set(roles[1:]) == {None}


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client).usage


def test_log_probabilities_are_the_models_own_and_their_bytes_make_the_text(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=3, temperature=1.7, seed=3, max_tokens=40).choices
    entries = choice.logprobs.content
    joined = b"".join(bytes(entry.bytes) for entry in entries)
    assert joined.decode(errors="replace").count("\ufffd") == choice.message.content.count("\ufffd")
    if "\ufffd" not in choice.message.content:
        assert joined.decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= entry.top_logprobs[0].logprob


def test_the_experts_of_each_token_are_told_on_demand(client, bundle):
    (choice,) = chat(client, logprobs=True, extra_body={"experts": True}).choices
    config = bundle.model.config
    for entry in choice.logprobs.content:
        assert len(entry.experts) == config.n_moe_blocks
        assert all(len(chosen) == config.experts_per_token for chosen in entry.experts)


def test_choices_differ_by_their_seed_and_repeat_with_it(client):
    settings = {"n": 3, "temperature": 1.5, "seed": 7}
    first, again = ([choice.message.content for choice in chat(client, **settings).choices] for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    third = chat(client, temperature=1.5, seed=9).choices[0]
    assert third.message.content == first[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_ends_before_a_stop_text_wherever_its_tokens_end(client, stream):
    whole = chat(client, max_tokens=40).choices[0].message.content
    for start, length in ((3, 1), (5, 4), (9, 7)):
        stop = whole[start : start + length]
        settings = {"max_tokens": 40, "stop": [stop, "\0never"], "logprobs": True, "stream": stream}
        if stream:
            chunks = list(chat(client, **settings))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (choice,) = chat(client, **settings).choices
            text, reason = choice.message.content, choice.finish_reason
            told = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace")
            assert whole.startswith(told)
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_a_logit_bias_decides_and_forbids(client, bundle):
    (token,) = bundle.tokenizer.encode("x")
    assert complete(client, logit_bias={str(token): 100}, max_tokens=3).choices[0].text == "xxx"
    greedy = complete(client, logprobs=0).choices[0].logprobs.tokens[0]
    greedy_id = next(i for i in range(600) if bundle.tokenizer.bytes_of(i).decode(errors="replace") == greedy)
    forbidden = complete(client, logit_bias={str(greedy_id): -100}, logprobs=0).choices[0].logprobs.tokens[0]
    assert forbidden != greedy


def test_a_text_continues_as_its_ids_do_and_prompts_stay_in_order(client, bundle):
    tokenizer = bundle.tokenizer
    ids = {text: [tokenizer.bos_id, *tokenizer.encode(text)] for text in ("The", "No one")}
    by_text = complete(client, prompt=list(ids), n=2)
    by_ids = complete(client, prompt=list(ids.values()), n=2)
    texts = [choice.text for choice in by_text.choices]
    assert texts == [choice.text for choice in by_ids.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(ids.values()):
        expected = tokenizer.decode_drawn(alone(bundle, prompt, frozenset({tokenizer.eos_id})).ids)
        assert texts[2 * number : 2 * number + 2] == [expected] * 2
    assert by_text.usage.prompt_tokens == sum(map(len, ids.values()))
    assert complete(client, prompt=ids["The"]).choices[0].text == texts[0]


def test_the_logprobs_of_a_completion_name_tokens_and_places(client):
    (choice,) = complete(client, logprobs=2).choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token


def test_a_streamed_completion_joined_is_the_answer_at_once(client):
    chunks = list(complete(client, stream=True, prompt=["The", "A"]))
    joined = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            joined[choice.index] += choice.text
    assert list(joined.values()) == [choice.text for choice in complete(client, prompt=["The", "A"]).choices]


def test_models_are_listed_with_what_the_page_shows(client, bundle):
    (card,) = client.models.list().data
    config = bundle.model.config
    assert card.id == MODEL_NAME
    assert card.context_length == config.context_length
    assert card.moe_blocks == [2, 4]
    assert card.n_routed_experts == config.n_routed_experts
    assert client.models.retrieve(MODEL_NAME) == card


def test_extra_parameters_reach_the_sampling(client):
    free = chat(client, temperature=2, seed=1).choices[0].message.content
    greedy = chat(client).choices[0].message.content
    assert free != greedy
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert chat(client, temperature=2, seed=1, extra_body=narrow).choices[0].message.content == greedy
    assert chat(client, temperature=2, seed=1, top_p=0).choices[0].message.content == greedy
    assert chat(client, temperature=1e-300).choices[0].message.content == greedy
    assert chat(client, extra_body={"top_k": 1_000_000}).choices[0].message.content == greedy
    penalised = chat(client, extra_body={"repetition_penalty": 10.0}, max_tokens=40).choices[0].message.content
    assert penalised != chat(client, max_tokens=40).choices[0].message.content


@pytest.mark.parametrize("length", [192, 193, 1920])
def test_a_prompt_that_leaves_no_room_is_refused(client, length):
    with pytest.raises(openai.BadRequestError, match=f"{length:,} tokens, the model's context is 192") as caught:
        complete(client, prompt=[300] * length)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the model's context is 192"):
        chat(client, messages=[{"role": "user", "content": "word " * length}])


def test_mistakes_arrive_as_the_clients_own_exceptions(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4o")
    assert caught.value.code == "model_not_found"
    assert "only 'tiny'" in caught.value.message
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be less than or equal to 2, got 9"):
        chat(client, temperature=9)


def test_text_parts_are_joined_and_a_developer_is_the_system(client):
    parts = [{"type": "text", "text": "Once upon "}, {"type": "text", "text": "a time?"}]
    by_parts = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert chat(client, messages=by_parts).choices == chat(client, messages=plain).choices
