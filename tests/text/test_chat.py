import json
import re
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanollm.sources.calculator import calculator
from nanollm.text.chat import (
    MIN_LIMIT,
    Conversation,
    Marks,
    Message,
    ToolCall,
    encode_conversation,
    encode_prompt,
    function_text,
    given_parts,
    reply_ends,
    reply_text,
    shorten,
    template_for,
)
from tests.export.strings import ALL_MARKS, TEMPLATE, conversations

TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "How far are the rocks?"),
        Message("assistant", "300 metres."),
        Message("user", "And the boat?"),
        Message("assistant", "Nearer."),
    )
)


def test_a_conversation_is_its_messages_between_marks(tokenizer):
    start, end = [tokenizer.bos_id], [tokenizer.mark_id("<|end|>")]
    expected = start
    for message in TALK.messages:
        expected = [*expected, tokenizer.mark_id(f"<|{message.role}|>"), *tokenizer.encode(message.content), *end]
    assert encode_conversation(TALK, tokenizer).ids == expected


def test_trained_are_exactly_the_words_of_the_assistant_and_their_end(tokenizer):
    encoded = encode_conversation(TALK, tokenizer)
    assert len(encoded.ids) == len(encoded.trained)
    trained = [token for token, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained]
    end = tokenizer.mark_id("<|end|>")
    assert trained == [*tokenizer.encode("300 metres."), end, *tokenizer.encode("Nearer."), end]


def test_a_prompt_is_the_conversation_up_to_the_reply(tokenizer):
    asked = Conversation(TALK.messages[:2])
    prompt, whole = encode_prompt(asked, tokenizer), encode_conversation(TALK, tokenizer).ids
    assert prompt[-1] == tokenizer.mark_id("<|assistant|>")
    assert whole[: len(prompt)] == prompt


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
WHAT_PEOPLE_WRITE = TEXTS | st.sampled_from([" x ", "\n\n", "a\n  b\n", "{{ x }} {% if %}", "<|", "<|end|", "|>", "<"])


@given(content=TEXTS | st.sampled_from(["<|end|>", "<|user|>hi", "</s>", "<|reserved_3|>"]))
@settings(max_examples=100, deadline=None)
def test_no_content_can_end_its_message_or_begin_another(tokenizer, content):
    ids = encode_conversation(Conversation.of(content, content), tokenizer).ids
    controls = [token for token in ids if token < 20]
    names = ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert controls == [tokenizer.bos_id, *map(tokenizer.mark_id, names)]
    assert tokenizer.decode(ids) == content * 2


def test_messages_out_of_turn_are_refused():
    user, assistant, system = Message("user", "u"), Message("assistant", "a"), Message("system", "s")
    for wrong in (
        [],
        [system],
        [assistant],
        [user, user],
        [user, system],
        [system, assistant],
        [user, assistant, assistant],
    ):
        with pytest.raises(ValueError, match="an optional system message, then user and assistant in turn; got"):
            Conversation(tuple(wrong))


def test_unknown_roles_and_contents_are_refused():
    with pytest.raises(ValueError, match="role must be one of system, user, assistant, tool, got 'robot'"):
        Message("robot", "beep")
    with pytest.raises(ValueError, match="content must be text, got NoneType"):
        Message("user", None)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_an_empty_message_is_refused_and_one_of_spaces_is_not(role):
    with pytest.raises(ValueError, match=f"a message of the {role} is empty; give it at least one character"):
        Message(role, "")
    assert Message(role, " ").content == " "


def test_two_system_messages_are_refused():
    system, user, assistant = Message("system", "s"), Message("user", "u"), Message("assistant", "a")
    for messages in ([system, system, user], [system, user, assistant, system]):
        with pytest.raises(ValueError, match="at most one system message, got 2; join them"):
            Conversation(tuple(messages))


def test_a_prompt_that_already_has_its_reply_is_refused(tokenizer):
    with pytest.raises(ValueError, match="must end with the user's message or a tool's"):
        encode_prompt(TALK, tokenizer)


def test_a_reply_is_the_text_before_its_end(tokenizer):
    said, end = tokenizer.encode("300 metres.\n"), tokenizer.mark_id("<|end|>")
    assert reply_text([*said, end, *tokenizer.encode("and more")], tokenizer) == "300 metres.\n"
    assert reply_text([*said, tokenizer.eos_id, *said], tokenizer) == "300 metres.\n"
    assert reply_text(said, tokenizer) == "300 metres.\n"
    assert reply_text([end, *said], tokenizer) == ""
    assert reply_text([], tokenizer) == ""
    assert reply_ends(tokenizer) == {end, tokenizer.eos_id}


# The template for other programs.


class Refused(Exception):
    pass


def raise_exception(message):
    raise Refused(message)


@pytest.fixture(scope="module", params=[True, False], ids=["as transformers", "plain"])
def rendered(request):
    """rendered(messages, add_generation_prompt): the text that a program makes of the template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=request.param, lstrip_blocks=request.param)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as transformers
    template = environment.from_string(TEMPLATE)

    def render(messages, add_generation_prompt=False, **more):
        plain = [
            each if isinstance(each, dict) else dict(zip(("role", "content"), each, strict=True)) for each in messages
        ]
        settings = {"add_generation_prompt": add_generation_prompt, "bos_token": "<s>"}
        return template.render(messages=plain, **settings, **more)

    return render


def pairs(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def ids_of(text, tokenizer):
    """What a tokenizer gives that recognises the marks in a text."""
    pieces = re.split(f"({'|'.join(map(re.escape, ALL_MARKS))})", text)
    return [
        token
        for piece in pieces
        for token in ([tokenizer.mark_id(piece)] if piece in ALL_MARKS else tokenizer.encode(piece))
    ]


def spells_no_mark(text):
    return not any(mark in text for mark in ALL_MARKS)


@given(conversation=conversations(WHAT_PEOPLE_WRITE.filter(spells_no_mark)))
@settings(max_examples=150, deadline=None)
def test_the_template_gives_the_ids_of_the_conversation(tokenizer, rendered, conversation):
    text = rendered(pairs(conversation))
    assert ids_of(text, tokenizer) == encode_conversation(conversation, tokenizer).ids
    if conversation.messages[-1].role == "user":
        prompt = rendered(pairs(conversation), add_generation_prompt=True)
        assert ids_of(prompt, tokenizer) == encode_prompt(conversation, tokenizer)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "asks nothing"),
        ([("system", "s")], "asks nothing"),
        ([("robot", "beep")], "message 1 must have the role user"),
        ([("assistant", "a")], "message 1 must have the role user"),
        ([("user", "u"), ("user", "u")], "message 2 must have the role assistant"),
        ([("system", "s"), ("system", "s"), ("user", "u")], "message 2 must have the role user"),
        ([("user", "u"), ("system", "s")], "message 2 must have the role assistant"),
        ([("user", "")], "content of message 1 must be text of at least one character"),
        ([("user", ["u"])], "content of message 1 must be text of at least one character"),
        *(
            ([("user", "u"), ("assistant", f"a{mark}b")], re.escape(f"message 2 spells the mark {mark}"))
            for mark in ALL_MARKS
        ),
    ],
)
def test_the_template_refuses_what_it_cannot_say(rendered, messages, reason):
    with pytest.raises(Refused, match=reason):
        rendered(messages)


def test_the_template_refuses_a_prompt_that_already_has_its_reply(rendered):
    with pytest.raises(Refused, match="must end with a message of the user or the tool"):
        rendered([("user", "u"), ("assistant", "a")], add_generation_prompt=True)


# Functions.

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Sums \u00e9 <b>.", "parameters": {"type": "object"}},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALLS = [{"function": {"name": "add", "arguments": '{"a":1}'}}, {"function": {"name": "now", "arguments": {"z": [2]}}}]
WITH_CALLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 and 2?"},
    {"role": "assistant", "content": "Hm.", "tool_calls": CALLS},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": None, "tool_calls": CALLS[1:]},
    {"role": "tool", "content": "noon"},
]


def with_calls(messages=WITH_CALLS):
    made = [
        Message(each["role"], each["content"] or "", tool_calls=tuple(map(ToolCall.of, each.get("tool_calls", ()))))
        for each in messages
    ]
    return Conversation(tuple(made), tuple(map(function_text, TOOLS)))


def test_calls_are_written_behind_the_words_and_functions_behind_the_system_message(tokenizer, rendered):
    call, tool = (f"<|reserved_{n}|>" for n in (0, 1))
    prompt = rendered(WITH_CALLS, add_generation_prompt=True, tools=TOOLS)
    assert prompt == (
        f"<s><|system|>Be brief.<|end|>"
        f'{tool}{{"name": "add", "description": "Sums \u00e9 <b>.", "parameters": {{"type": "object"}}}}\n'
        f'{{"name": "now"}}<|end|><|user|>1 and 2?<|end|>'
        f'<|assistant|>Hm.{call}add {{"a":1}}{call}now {{"z": [2]}}<|end|>{tool}3<|end|>{tool}<|end|>'
        f'<|assistant|>{call}now {{"z": [2]}}<|end|>{tool}noon<|end|><|assistant|>'
    )
    assert ids_of(prompt, tokenizer) == encode_prompt(with_calls(), tokenizer)


def test_calls_are_trained_and_what_tools_say_is_not(tokenizer):
    encoded = encode_conversation(with_calls(), tokenizer)
    trained = [token for token, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained]
    call, end = tokenizer.mark_id("<|reserved_0|>"), tokenizer.mark_id("<|end|>")
    now = [call, *tokenizer.encode('now {"z": [2]}'), end]
    assert trained == [*tokenizer.encode("Hm."), call, *tokenizer.encode('add {"a":1}'), *now, *now]


@pytest.mark.parametrize("cut", [(3, 4), (2, 3), (3, 5), (6, 7)])
def test_a_call_without_its_answer_and_an_answer_without_its_call_are_refused(tokenizer, rendered, cut):
    messages = [*WITH_CALLS[: cut[0]], *WITH_CALLS[cut[1] :]]
    with pytest.raises(ValueError, match=r"behind each call comes one message of the tool|or a tool's"):
        encode_prompt(with_calls(messages), tokenizer)
    with pytest.raises(Refused):
        rendered(messages, add_generation_prompt=True, tools=TOOLS)


def test_calls_that_are_none_are_refused():
    for name in ("", "a b", "x" * 65, None):
        with pytest.raises(ValueError, match="a function's name must be 1 to 64 letters"):
            ToolCall(name, "{}")
    for arguments in ("", "[1]", "{", "{" * 5000, '"a"'):
        with pytest.raises(ValueError, match="must be a JSON object"):
            ToolCall("add", arguments)
    with pytest.raises(ValueError, match="only the assistant calls functions"):
        Message("user", "u", tool_calls=(ToolCall("add", "{}"),))


def test_a_template_without_marks_for_tools_refuses_them():
    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(template_for(["<s>", "<|end|>"]))
    with pytest.raises(Refused, match="no marks for tools"):
        template.render(messages=WITH_CALLS[1:2], tools=TOOLS)


# Conversations that are too long.


@pytest.fixture(scope="module")
def marks(tokenizer):
    return Marks.of(tokenizer)


def arrays(conversation, tokenizer):
    encoded = encode_conversation(conversation, tokenizer)
    return np.array(encoded.ids, dtype=np.uint16), np.array(encoded.trained)


def shape(ids, marks):
    """The conversation's marks in order, and "+" for the words between two of them."""
    names = {2: "<s>"} | {getattr(marks, name): name for name in marks._fields}
    return [name for name, _ in groupby(names.get(int(token), "+") for token in ids) if name != "+"]


def question_of(ids, marks):
    start = np.flatnonzero(ids == marks.user)[-1] + 1
    return ids[start : start + np.flatnonzero(ids[start:] == marks.end)[0]].tolist()


@given(conversation=conversations(st.text("abc de\n", min_size=1, max_size=60)), limit=st.integers(MIN_LIMIT, 120))
@settings(max_examples=300, deadline=None)
def test_a_shortened_conversation_fits_is_well_formed_and_still_teaches(tokenizer, marks, conversation, limit):
    ids, trained = arrays(conversation, tokenizer)
    short = shorten(ids, trained, limit, marks)
    assert len(short.ids) == len(short.trained) == min(limit, len(short.ids))
    assert short.trained.any() == trained.any()
    assert short.ids[0] == tokenizer.bos_id
    roles = [message.role for message in conversation.messages]
    whole = ["<s>", *(part for role in roles for part in (role, "end"))]
    system = whole[:3] if roles[0] == "system" else whole[:1]
    left = shape(short.ids, marks)
    assert left[: len(system)] == system
    turns = left[len(system) :]
    assert turns == (["user", "end", "assistant", "end"] * len(turns))[: len(turns)]  # only the last end may be missing
    again = shorten(ids, trained, limit, marks)
    assert again.ids.tolist() == short.ids.tolist()
    assert again.trained.tolist() == short.trained.tolist()
    if len(ids) <= limit:
        assert (short.ids.tolist(), short.cuts) == (ids.tolist(), ())
    else:
        assert short.cuts
    assert shorten(short.ids, short.trained, limit, marks).cuts == ()


def talk(*contents):
    return Conversation(tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)))


def test_the_oldest_exchanges_go_first_and_the_system_message_stays(tokenizer, marks):
    turns = ("one?", "One it is.", "two?", "Two it is.", "three?", "Three it is.")
    system = Message("system", "Be brief.")
    whole = Conversation((system, *talk(*turns).messages))
    for dropped in (2, 4):
        expected, expected_trained = arrays(Conversation((system, *talk(*turns[dropped:]).messages)), tokenizer)
        for limit in (len(expected), len(expected) + 5):
            short = shorten(*arrays(whole, tokenizer), limit, marks)
            assert short.ids.tolist() == expected.tolist()
            assert short.trained.tolist() == expected_trained.tolist()
            assert short.cuts == ("dropped turns",)


def test_a_last_question_that_nobody_answers_goes_before_what_is_answered(tokenizer, marks):
    short = shorten(*arrays(talk("one?", "One it is.", "two " * 50), tokenizer), 40, marks)
    assert short.ids.tolist() == encode_conversation(talk("one?", "One it is."), tokenizer).ids
    assert short.cuts == ("dropped turns",)


def test_a_long_reply_loses_its_end_and_with_it_the_end_mark(tokenizer, marks):
    ids, trained = arrays(talk("Count!", "one two three " * 30), tokenizer)
    short = shorten(ids, trained, 50, marks)
    assert short.ids.tolist() == ids[:50].tolist()
    assert short.trained.tolist() == trained[:50].tolist()
    assert marks.end not in short.ids[short.trained]
    assert short.cuts == ("cut reply",)


def test_a_long_question_survives_with_its_beginning_and_its_end(tokenizer, marks):
    task, text, final = (
        "Name the colour in this text.",
        "the sea was grey and the boat was old " * 20,
        "Now: the red fox.",
    )
    ids, trained = arrays(talk(f"{task} {text} {final}", "Red."), tokenizer)
    short = shorten(ids, trained, 80, marks)
    asked = tokenizer.decode(question_of(short.ids, marks))
    assert asked.startswith(task)
    assert asked.endswith(final)
    reply = [*tokenizer.encode("Red."), marks.end]
    assert short.ids[short.trained].tolist() == reply
    assert (len(short.ids), short.cuts) == (80, ("cut question",))


def test_a_long_reply_keeps_a_quarter_beside_a_long_question(tokenizer, marks):
    ids, trained = arrays(talk("why " * 100, "because " * 100), tokenizer)
    short = shorten(ids, trained, 80, marks)
    assert (len(short.ids), int(short.trained.sum())) == (80, 20)
    assert short.cuts == ("cut reply", "cut question")


def test_a_long_system_message_gives_before_a_short_question(tokenizer, marks):
    whole = Conversation((Message("system", "Be brief. " * 60), *talk("How far are the rocks?", "Far.").messages))
    short = shorten(*arrays(whole, tokenizer), 60, marks)
    assert question_of(short.ids, marks) == tokenizer.encode("How far are the rocks?")
    assert len(short.ids) == 60


def test_too_little_room_for_any_conversation_is_refused(tokenizer, marks):
    with pytest.raises(ValueError, match="needs room for at least 9 ids, got 8; give a longer context"):
        shorten(*arrays(TALK, tokenizer), MIN_LIMIT - 1, marks)


def test_what_a_tool_would_have_written_is_encoded_by_itself_and_not_trained(tokenizer):
    text = "He has 5*3=<<5*3=15>>15 cups.\nTogether 5+15=<<5+15=20>>20.\n#### 20"
    parts = list(given_parts(text, [calculator]))
    assert [part for part, is_given in parts if is_given] == ["15>>", "20>>"]
    encoded = encode_conversation(Conversation.of("How many?", text), tokenizer, [calculator])
    reply = encoded.ids.index(tokenizer.mark_id("<|assistant|>")) + 1
    assert encoded.ids[reply:-1] == [token for part, _ in parts for token in tokenizer.encode(part)]
    spelled = zip(encoded.ids[reply:], encoded.trained[reply:], strict=True)
    assert [token for token, is_trained in spelled if not is_trained] == [
        token for part, is_given in parts if is_given for token in tokenizer.encode(part)
    ]


def test_a_result_that_the_tool_would_not_write_is_the_models():
    assert list(given_parts("1/3=<<1/3=.3>>.3", [calculator])) == [("1/3=<<1/3=.3>>.3", False)]
