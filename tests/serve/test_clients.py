"""Programs that people put before a server get from ours what OpenAI's own client gets: libraries, and chat pages."""

import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from nanollm.bundle import Bundle
from nanollm.model.transformer import Transformer
from tests.conftest import STORY
from tests.serve.conftest import random_bundle
from tests.serve.running import MODEL_NAME, serving

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install openai")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

MESSAGES = [{"role": "user", "content": "Once upon a time?"}]
ANN, END = '{"name": "Ann", "age": 3}', "END"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected(server):
    """What OpenAI's client hears: a reply, and a text that goes on."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chat = client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, max_tokens=12, temperature=0)
        text = client.completions.create(model=MODEL_NAME, prompt="The", max_tokens=12, temperature=0)
    return chat.choices[0].message.content, text.choices[0].text


@pytest.fixture
def says_ann(bundle, serve_extra):
    """A server whose model says one word and then, by a tool, always the same JSON; its context holds long prompts."""

    def make_tool():
        tokens = itertools.count(1)
        return lambda token: bundle.tokenizer.encode(ANN + END) if next(tokens) == 1 else []

    config = replace(bundle.model.config, context_length=2048)
    with serving(Bundle(Transformer(config).init(0).eval(), bundle.tokenizer, {})) as running:
        running.service.make_tools[MODEL_NAME] = make_tool
        yield running


# Libraries


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # it keeps its connections
def test_langchain_replies_streams_batches_and_tells_mistakes(server, expected):
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    settings = {"base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12, "max_retries": 0}
    chat = langchain.ChatOpenAI(model=MODEL_NAME, **settings)
    reply = chat.invoke(MESSAGES)
    assert reply.content == expected[0]
    assert reply.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in chat.stream(MESSAGES)) == expected[0]
    assert [each.content for each in chat.batch([MESSAGES] * 2)] == [expected[0]] * 2
    text = langchain.OpenAI(model=MODEL_NAME, **settings)
    assert text.invoke("The") == "".join(text.stream("The")) == expected[1]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        langchain.ChatOpenAI(model="other", **settings).invoke(MESSAGES)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_litellm_replies_streams_and_tells_mistakes(server, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it would load a list from the network
    litellm = pytest.importorskip("litellm", reason="pip install litellm")
    settings = {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    for provider in ("openai", "hosted_vllm"):
        chat = {"model": f"{provider}/{MODEL_NAME}", "messages": MESSAGES} | settings
        assert litellm.completion(**chat).choices[0].message.content == expected[0]
        chunks = litellm.completion(**chat, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[0]
    text = litellm.text_completion(
        "The", model=f"text-completion-openai/{MODEL_NAME}", echo=True, logprobs=1, **settings
    )
    assert text.choices[0].text == "The" + expected[1]
    assert text.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(litellm.NotFoundError, match="there is no model 'other' here"):
        litellm.completion(model="openai/other", messages=MESSAGES, **settings)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::DeprecationWarning")
def test_instructor_reads_an_object_from_a_plain_reply_and_asks_again_without_one(says_ann):
    instructor = pytest.importorskip("instructor", reason="pip install --no-deps instructor")
    from instructor.core.exceptions import InstructorRetryException
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    class Place(BaseModel):
        street: str

    with openai.OpenAI(base_url=f"{says_ann.url}/v1", api_key="none", max_retries=0) as client:
        asks = instructor.from_openai(client, mode=instructor.Mode.MD_JSON)
        asked = {"model": MODEL_NAME, "messages": MESSAGES, "stop": END, "temperature": 0}
        person = asks.chat.completions.create(response_model=Person, **asked)
        assert (person.name, person.age) == ("Ann", 3)
        with pytest.raises(InstructorRetryException, match="street") as caught:
            asks.chat.completions.create(response_model=Place, max_retries=1, **asked)
    assert caught.value.n_attempts == 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_libraries_get_objects_of_their_classes_by_calls_and_by_schemas(tokenizer, serve_extra, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    instructor = pytest.importorskip("instructor", reason="pip install --no-deps instructor")
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    litellm = pytest.importorskip("litellm", reason="pip install litellm")
    from pydantic import BaseModel, Field

    class Event(BaseModel, extra="forbid"):
        name: str = Field(max_length=9)
        day: Literal["Monday", "Friday"]

    with serving(random_bundle(tokenizer, 2048)) as running:
        url, asked = f"{running.url}/v1", {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 200}
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
                asks = instructor.from_openai(client, mode=mode)
                assert isinstance(asks.chat.completions.create(response_model=Event, max_retries=0, **asked), Event)
        chat = langchain.ChatOpenAI(model=MODEL_NAME, base_url=url, api_key="none", max_tokens=200, max_retries=0)
        for method in ("json_schema", "function_calling"):
            assert isinstance(chat.with_structured_output(Event, method=method).invoke(MESSAGES), Event)
        (call,) = chat.bind_tools([Event], tool_choice="Event").invoke(MESSAGES).tool_calls
        assert Event(**call["args"])
        asked |= {"model": f"openai/{MODEL_NAME}", "api_base": url, "api_key": "none"}
        reply = litellm.completion(response_format=Event, **asked)
        assert Event.model_validate_json(reply.choices[0].message.content)


def test_the_ai_package_of_npm_replies_streams_and_tells_mistakes(server, expected):
    node = shutil.which("node") or pytest.skip("Node.js is not installed: apt-get install npm")
    if not (REPOSITORY / "node_modules" / "@ai-sdk" / "openai-compatible").is_dir():
        pytest.skip("the packages are not installed: npm install ai@6 @ai-sdk/openai-compatible@2")
    command = [node, Path(__file__).with_name("clients.mjs"), server.url, MODEL_NAME, REPOSITORY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"] == told["joined"] == expected[0]
    assert (told["finishReason"], told["tokens"][1], told["streamed"]) == ("length", 12, 12)
    assert told["completion"] and told["error"].startswith("there is no model 'other' here")


# Chat pages, by what their documentation says that they send


def ask(server, path, body=None):
    headers = {"Authorization": "Bearer none"}
    if body is None:
        return httpx.get(server.url + path, headers=headers)
    return httpx.post(server.url + path, json={"model": MODEL_NAME} | body, headers=headers)


def joined(response):
    """The text of a stream."""
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in json.loads(event)["choices"])


OPEN_WEBUI = {
    "stream": True,
    "messages": MESSAGES,
    "max_tokens": 12,
    "temperature": 0,
    "stream_options": {"include_usage": True},
}
LIBRECHAT = {
    "temperature": 0,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "user": "LibreChat_User_ID",
    "stream": True,
    "messages": MESSAGES,
    "max_tokens": 12,
}


@pytest.mark.parametrize("body", [OPEN_WEBUI, LIBRECHAT], ids=["Open WebUI", "LibreChat"])
def test_a_chat_page_lists_the_models_and_streams_a_reply(server, expected, body):
    assert [card["id"] for card in ask(server, "/v1/models").json()["data"]] == [MODEL_NAME]
    assert joined(ask(server, "/v1/chat/completions", body)) == expected[0]


def test_a_prompt_for_a_title_that_is_too_long_is_refused_and_leaves_the_chat_alone(server):
    """Open WebUI's prompts for titles, tags and follow-ups are longer than a small context: hence the how-to."""
    task = {"stream": False, "messages": [{"role": "user", "content": "### Task:\n" + STORY.read_text("utf-8")}]}
    response = ask(server, "/v1/chat/completions", task | {"max_completion_tokens": 1000})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
