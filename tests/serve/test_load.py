"""Every one of many readers gets its own reply, and nothing remains of those who leave."""

import asyncio
import json
import random
from collections import Counter

import pytest

from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.text.chat import Conversation, encode_prompt, reply_borders
from tests.conftest import STORY
from tests.serve.running import MODEL_NAME

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

STREAMS, ROUNDS = 64, 2
LEAVING = 0.1


@pytest.fixture(scope="module")
def solo(bundle):
    """The replies to 40 questions that are asked alone, at temperature 0: text by (question, length)."""
    words = STORY.read_text(encoding="utf-8").split()
    texts = {}
    for number in range(40):
        chosen = random.Random(number)
        question, length = " ".join(chosen.choices(words, k=chosen.randint(1, 25))), chosen.randint(1, 40)
        prompt, ends = encode_prompt(Conversation.of(question), bundle.tokenizer), reply_borders(bundle.tokenizer)
        greedy = SamplingConfig(temperature=0)
        (completion,) = generate(bundle.model, [prompt], greedy, max_tokens=length, stop_token_ids=ends)
        texts[question, length] = bundle.tokenizer.decode_drawn(completion.ids)
    return texts


def test_many_streams_get_what_each_would_get_alone_and_leavers_free_their_rows(serve, solo):
    counts, wrong = Counter(), []

    async def ask(client, chance):
        for _ in range(ROUNDS):
            (question, length), expected = chance.choice(list(solo.items()))
            leaves_after = chance.randint(1, 5) if chance.random() < LEAVING else None
            text, is_whole = await read(client, question, length, leaves_after)
            counts["finished" if is_whole else "left"] += 1
            if not (text == expected if is_whole else expected.startswith(text)):
                wrong.append((question, expected, text))

    async def ask_all(url):
        limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(ask(client, random.Random(number)) for number in range(STREAMS)))

    with serve(max_running=16) as running:
        asyncio.run(ask_all(running.url))
        running.settle()  # fails if a row is still taken after five seconds
    assert wrong == []
    assert counts["finished"] + counts["left"] == ROUNDS * STREAMS
    assert counts["finished"] >= STREAMS and counts["left"] >= 3


async def read(client, question, length, leaves_after):
    """The text of one stream, and whether it was read to its end."""
    messages = [{"role": "user", "content": question}]
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": length, "temperature": 0, "stream": True}
    text, chunks = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text, True
            if line:
                chunks += 1
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                if chunks == leaves_after:
                    return text, False
    raise AssertionError("the stream ended without [DONE]")
