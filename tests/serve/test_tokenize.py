"""Ids of texts and conversations over HTTP are those that completions and chats are replied to."""

import pytest

from nanollm.text.chat import Conversation, Message, encode_prompt
from tests.serve.running import MODEL_NAME

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")


def post(server, path, **asked):
    return httpx.post(server.url + path, json={"model": MODEL_NAME} | asked)


@pytest.mark.parametrize("text", ["", "Once, f\u00fcr the \u65e5 sea.\n", "<|user|> 12"])
def test_texts_there_and_back(server, bundle, text):
    ids = bundle.tokenizer.encode(text)
    answer = post(server, "/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["tokens"] == [bundle.tokenizer.bos_id, *ids]
    assert (answer["count"], answer["max_model_len"]) == (1 + len(ids), bundle.model.config.context_length)
    assert len(answer["token_strs"]) == answer["count"]
    assert post(server, "/tokenize", prompt=text, add_special_tokens=False).json()["tokens"] == ids
    assert post(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_a_conversation_has_the_ids_that_a_chat_counts(server, bundle):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once?"}]
    tokens = post(server, "/tokenize", messages=messages).json()["tokens"]
    conversation = Conversation(tuple(Message(each["role"], each["content"]) for each in messages))
    assert tokens == encode_prompt(conversation, bundle.tokenizer)
    tools = {"tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]}
    for asked, count in (
        ({}, len(tokens)),
        (tools, post(server, "/tokenize", messages=messages, **tools).json()["count"]),
    ):
        chat = post(server, "/v1/chat/completions", messages=messages, max_tokens=1, **asked).json()
        assert chat["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "asked", "message"),
    [
        ("/tokenize", {}, "expected either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "there is no model 'other' here"),
        ("/tokenize", {"prompt": "a", "functions": [{}]}, "functions is not supported"),
        ("/detokenize", {"tokens": [600]}, "expected ids from 0 to 599, got 600"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
    ],
)
def test_what_has_no_ids_or_text_is_refused(server, path, asked, message):
    response = post(server, path, **asked)
    assert response.status_code in (400, 404)
    assert message in response.json()["error"]["message"]
