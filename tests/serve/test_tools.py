"""OpenAI's client gets calls of functions and replies of the form that it asks for."""

import json
import time

import pytest

from nanollm.generate.model import LanguageModel
from tests.serve.conftest import random_bundle
from tests.serve.running import MODEL_NAME, serving

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install openai")
jsonschema = pytest.importorskip("jsonschema", reason="schemathesis brings it: pip install schemathesis")

ASKED = [{"role": "user", "content": "Add 1 and 2."}]
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
PARAMETERS = {
    "type": "object",
    "properties": {"a": NUMBER, "unit": {"enum": ["m", "km", "na\u00efve {}"]}},
    "required": ["a", "unit"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "description": "Sums.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
ANSWER = {"role": "tool", "tool_call_id": "c", "content": "3"}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def server(tokenizer, serve_extra):
    with serving(random_bundle(tokenizer, 600)) as running:  # functions take room
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, **settings):
    defaults = {"model": MODEL_NAME, "messages": ASKED, "max_tokens": 60, "temperature": 1, "seed": 3}
    return client.chat.completions.create(**defaults | settings)


def refused(client, **settings):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    return caught.value.message


# --- calls ---


def test_a_named_function_is_called_once_with_arguments_by_its_schema(client):
    for seed in range(8):
        choice = chat(client, tools=[NOW, ADD], tool_choice=NAMED, seed=seed).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason, call.type) == (None, "tool_calls", "function")
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_required_calls_some_and_parallel_calls_may_be_forbidden(client):
    several = set()
    for seed in range(12):
        calls = chat(client, tools=[NOW, ADD], tool_choice="required", seed=seed).choices[0].message.tool_calls
        assert len({call.id for call in calls}) == len(calls)
        several.add(len(calls) > 1)
        alone = chat(client, tools=[NOW, ADD], tool_choice="required", seed=seed, parallel_tool_calls=False)
        assert len(alone.choices[0].message.tool_calls) == 1
    assert several == {True, False}


@pytest.mark.parametrize("choice", ["required", "auto", NAMED])
def test_a_stream_of_calls_joined_is_the_answer_at_once(client, tokenizer, choice):
    # What the bias makes likely: a call behind some words, or several calls.
    bias = {str(tokenizer.mark_id("<|reserved_0|>")): 4.0}
    kinds = set()
    for seed in range(6):
        settings = {"tools": [NOW, ADD], "tool_choice": choice, "seed": seed, "logit_bias": bias, "logprobs": True}
        whole = chat(client, **settings).choices[0]
        text, calls, tokens, reason = "", [], [], None
        for chunk in chat(client, stream=True, **settings):
            (part,) = chunk.choices
            text += part.delta.content or ""
            tokens += part.logprobs.content if part.logprobs else []
            reason = part.finish_reason
            for call in part.delta.tool_calls or ():
                if call.id:
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
        expected = [[call.function.name, call.function.arguments] for call in whole.message.tool_calls or ()]
        assert (text or None, calls, reason) == (whole.message.content or None, expected, whole.finish_reason)
        assert [entry.logprob for entry in tokens] == [entry.logprob for entry in whole.logprobs.content]
        kinds.add((bool(text), bool(calls)))
    assert (choice == "auto", True) in kinds


@pytest.mark.parametrize("choice", ["auto", "none", "required", NAMED])
def test_python_gives_the_servers_messages(client, tokenizer, choice):
    mark, kinds = tokenizer.mark_id("<|reserved_0|>"), set()
    model = LanguageModel(random_bundle(tokenizer, 600))
    for seed in range(6):
        both = {"tools": [NOW, ADD], "tool_choice": choice, "seed": seed, "max_tokens": 60, "stop": ["e\n"]}
        expected = chat(client, **both, logit_bias={str(mark): 4.0}).choices[0].message
        reply = model.chat(ASKED, **both, logit_bias={mark: 4.0}, temperature=1.0)
        calls = [each.function.model_dump() for each in expected.tool_calls or ()]
        assert (reply["content"], [each["function"] for each in reply["tool_calls"]]) == (expected.content, calls)
        kinds.add(bool(calls))
    assert kinds == ({False} if choice == "none" else kinds | {True})
    call = model.chat(ASKED, tools=[ADD], tool_choice=NAMED, max_tokens=60, seed=1)
    assert model.chat([*ASKED, call, {"role": "tool", "content": "3"}], max_tokens=5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tools": [ADD, ADD]}, "tools has the name add twice"),
        ({"tools": [{"name": "add"}]}, "a tool must be"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice names 'add', tools has now"),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice must be none, auto, required or name a function"),
        ({"tool_choice": "required"}, "tool_choice required expects tools"),
    ],
)
def test_python_refuses_tools_in_the_servers_words(tokenizer, settings, reason):
    with pytest.raises(ValueError, match=reason):
        LanguageModel(random_bundle(tokenizer, 600)).chat(ASKED, **settings)


def test_a_conversation_with_answers_of_tools_is_replied_to(client):
    call = chat(client, tools=[ADD], tool_choice=NAMED).choices[0].message
    answered = [*ASKED, call, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "3"}]
    reply = chat(client, messages=answered, tools=[ADD], tool_choice="none")
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content
    read = chat(client, messages=answered, tools=[ADD], max_tokens=1).usage.prompt_tokens
    assert read > reply.usage.prompt_tokens  # with tool_choice none the model sees no functions


def test_answers_are_read_in_the_order_of_their_calls(client):
    made = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("x", "y")]
    said = {"role": "assistant", "content": None, "tool_calls": made}
    answers = [{"role": "tool", "tool_call_id": name, "content": f"I am {name}."} for name in ("x", "y")]
    settings = {"temperature": 0, "max_tokens": 20}
    first, second = (
        chat(client, messages=[*ASKED, said, *order], **settings).choices[0].message.content
        for order in (answers, answers[::-1])
    )
    assert first == second


def test_calls_that_max_tokens_cuts_say_so(client):
    choice = chat(client, tools=[ADD], tool_choice=NAMED, max_tokens=6).choices[0]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tools": [ADD, ADD]}, "tools has the name add twice"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "an object"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice names 'add', tools has now"),
        ({"tool_choice": "required"}, "tool_choice required expects tools"),
        ({"messages": [*ASKED, ANSWER]}, "the message before has no call with the tool_call_id 'c'"),
        ({"messages": [*ASKED, {"role": "tool", "content": "3"}]}, "tool_call_id go together"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is missing"),
        ({"functions": [{"name": "f"}]}, "functions is not supported; use tools"),
    ],
)
def test_tools_that_cannot_be_meant_are_refused(client, settings, reason):
    assert reason in refused(client, **settings)


@pytest.mark.parametrize("arguments", ["[1]", "{", "", "5"])
def test_arguments_that_are_no_object_are_refused(client, arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert "must be a JSON object" in refused(client, messages=[*ASKED, *said, ANSWER])


def test_keywords_that_cannot_be_followed_are_passed_over_unless_the_call_must_follow_them(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {"required": ["a"]}}}}
    assert chat(client, tools=[tool]).choices
    assert "Unimplemented keys" in refused(client, tools=[tool], tool_choice="required")
    strict = {"type": "function", "function": tool["function"] | {"strict": True}}
    assert "Unimplemented keys" in refused(client, tools=[strict])


# --- forms of a reply ---

FORMS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": PARAMETERS, "strict": True}}},
    {"extra_body": {"guided_json": PARAMETERS}},
    {"extra_body": {"guided_json": json.dumps(PARAMETERS)}},
    {"extra_body": {"structured_outputs": {"json": PARAMETERS}}},
]


@pytest.mark.parametrize("form", FORMS)
def test_a_schema_is_followed_however_it_is_asked_for(client, form):
    for choice in chat(client, n=4, **form).choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PARAMETERS)
    assert chat(client, **form).choices == chat(client, **FORMS[0]).choices


def test_patterns_and_choices_are_followed_by_completions_too(client):
    def complete(**form):
        asked = {"model": MODEL_NAME, "prompt": ["The", "A"], "max_tokens": 30}
        return {choice.text for choice in client.completions.create(**asked, extra_body=form).choices}

    assert complete(guided_choice=["yes", "no\n"]) <= {"yes", "no\n"}
    assert complete(structured_outputs={"choice": ["only"]}) == {"only"}
    assert all(len(text) == 5 and text.isdigit() for text in complete(guided_regex="[0-9]{5}"))
    assert all(text.startswith("{") for text in complete(response_format={"type": "json_object"}))


def test_a_form_holds_in_a_stream_with_stop_texts_and_log_probabilities(client):
    whole = chat(client, temperature=0, **FORMS[0]).choices[0].message.content
    stop = whole[3:5]
    cut = chat(client, temperature=0, stop=[stop], logprobs=True, **FORMS[0]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert "".join(bytes(entry.bytes).decode() for entry in cut.logprobs.content) == cut.message.content
    chunks = chat(client, temperature=0, stream=True, **FORMS[0])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_pydantic_classes_are_parsed(client):
    pydantic = pytest.importorskip("pydantic", reason="openai brings it: pip install openai")

    class Sum(pydantic.BaseModel):
        a: int = pydantic.Field(ge=0, le=99)
        b: bool

    parsed = client.chat.completions.parse(
        model=MODEL_NAME, messages=ASKED, max_tokens=60, response_format=Sum, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"guided_regex": "(?=a)b"}, "guided_regex: .*look-around"),
        ({"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json: .*retrieving it failed"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "guided_json: .*retrieving it failed"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000}, "nested too deeply"),
        (
            {"guided_json": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(700)}}},
            "the grammar cannot be followed any further",
        ),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "both say what the reply must look like"),
        ({"structured_outputs": {"json": PARAMETERS, "json_object": True}}, "both say what the reply must look like"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar is not supported"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"response_format": {"type": "json_schema"}}, "go together"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}}, "Unsatisfiable"),
    ],
)
def test_forms_that_cannot_be_followed_are_refused_with_the_reason(client, body, reason):
    with pytest.raises(openai.BadRequestError, match=reason):
        chat(client, extra_body=body)


HOSTILE = {
    "patterns to intersect": {"allOf": [{"type": "string", "pattern": f".*[a-m].{{{n}}}z"} for n in range(30)]},
    "a huge enum": {"enum": [f"value {n}" for n in range(60_000)]},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(3000)}},
    "a multiple": {"type": "integer", "multipleOf": 99_999_999},
    "itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "alternatives of alternatives": {
        "allOf": [{"anyOf": [{"properties": {f"k{n}{m}": {"type": "string"}}} for n in range(9)]} for m in range(9)]
    },
}


def test_hostile_schemas_are_refused_in_time_and_hold_up_nobody(client, server):
    server.service.examiner.start()
    chat(client, **FORMS[0])
    for name, schema in HOSTILE.items():
        began = time.monotonic()
        with pytest.raises(openai.BadRequestError):
            chat(client, extra_body={"guided_json": schema})
        assert time.monotonic() - began < 5, name  # one second on a machine that does nothing else
    assert chat(client, **FORMS[0]).choices == chat(client, **FORMS[1]).choices
    assert server.engine.is_alive
