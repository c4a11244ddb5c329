import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanollm.sources import gsm8k
from nanollm.sources.datasets import _parse_chat, chats, openwebtext, stream_rows, super_natural_instructions
from nanollm.text.chat import Conversation, Message, ToolCall

QUESTION, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": " Me.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


# From the hub.


def dataset(folder, columns, split="train"):
    """A local folder that `datasets` opens like a dataset of the hub."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_rows_are_streamed_and_bad_ones_reported_by_row(tmp_path):
    name = dataset(tmp_path / "owt", {"id": [1, 2, 3, 4], "text": ["a", None, "", "b"]})
    bad = []
    assert list(stream_rows(name, "train", ["text"], bad.append)) == [("a",), ("b",)]
    assert [(record.path, record.line, record.reason) for record in bad] == [
        (f"{name}:train", 2, "text is missing"),
        (f"{name}:train", 3, "text is empty"),
    ]


def test_openwebtext_instructions_and_problems_have_their_schemas(tmp_path):
    owt = dataset(tmp_path / "owt", {"text": ["a document"]})
    sni = dataset(tmp_path / "sni", {"prompt": ["p"], "response": ["r"]})
    problems = {"question": ["q"], "answer": ["1 + 1 = 2\n#### 2"]}
    gsm = dataset(tmp_path / "gsm", problems, "test")
    assert list(openwebtext(None, pytest.fail, name=owt)) == ["a document"]
    (talk,) = super_natural_instructions(None, "train", pytest.fail, name=sni)
    assert [message.content for message in talk.messages] == ["p", "r"]
    rows = stream_rows(gsm, "test", gsm8k.COLUMNS, pytest.fail)
    assert list(rows) == [("q", "1 + 1 = 2\n#### 2")]


def test_a_wrong_column_names_those_that_are_there(tmp_path):
    name = dataset(tmp_path / "owt", {"id": ["1"], "body": ["a"]})
    with pytest.raises(ValueError, match="has no column text, only id, body; choose with --text_column"):
        list(stream_rows(name, "train", ["text"], pytest.fail))


def test_a_missing_split_or_dataset_is_the_users_to_mend(tmp_path):
    name = dataset(tmp_path / "owt", {"text": ["a"]})
    with pytest.raises(ValueError, match=r"cannot open the dataset .*owt \(tests\): .*check the name, the split"):
        list(stream_rows(name, "tests", ["text"], pytest.fail))
    with pytest.raises(ValueError, match="cannot open the dataset"):
        list(stream_rows(str(tmp_path / "nothing"), "train", ["text"], pytest.fail))
    with pytest.raises(ValueError, match=r"cannot open the dataset Skylion007/openwebtext \(train\)"):
        next(openwebtext(None, pytest.fail))


def test_a_dataset_that_breaks_off_says_at_which_row(tmp_path):
    name = dataset(tmp_path / "owt", {"text": [f"document {n} " * 500 for n in range(2000)]})
    file = tmp_path / "owt" / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"owt \(train\) broke off at row 1: "):
        list(stream_rows(name, "train", ["text"], pytest.fail))


@pytest.mark.realdata
def test_real_parquet_is_streamed_as_from_the_hub(shared_data):
    rows = stream_rows(str(shared_data / "openwebtext"), "train", ["text"], pytest.fail)
    assert sum(len(text) > 0 for _, (text,) in zip(range(500), rows, strict=False)) == 500


# From files.


def test_documents_and_instructions_come_from_files(tmp_path):
    (tmp_path / "owt.jsonl").write_text('{"text": "a document"}\n{"text": ""}\n')
    (tmp_path / "sni.csv").write_text("response,prompt\nyes,really?\n")
    bad = []
    assert list(openwebtext([tmp_path / "owt.jsonl"], bad.append)) == ["a document"]
    assert [record.line for record in bad] == [2]
    (talk,) = super_natural_instructions([tmp_path / "sni.csv"], "train", pytest.fail)
    assert [(message.role, message.content) for message in talk.messages] == [("user", "really?"), ("assistant", "yes")]


@pytest.mark.realdata
def test_all_instructions_are_read(shared_data):
    bad = []
    talks = super_natural_instructions([shared_data / "supernatural-instructions"], "train", bad.append)
    assert sum(1 for _ in talks) + len(bad) == 46_693


# Conversations that someone wrote down.


def test_messages_become_conversations_word_for_word(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in [[QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER]]))
    bad = []
    assert list(chats([tmp_path], bad.append)) == [
        Conversation.of("Who?", " Me.\n"),
        Conversation((Message("system", "Be brief."), Message("user", "Who?"), Message("assistant", " Me.\n"))),
    ]
    assert bad == []


def spoken(record):
    """The conversation of a record and why it is none, whichever there is."""
    found = _parse_chat(record, Counter())
    return found if isinstance(found, str) else [(each.role, each.content, each.is_trained) for each in found.messages]


ASKED, SAID = ("user", "Who?", True), ("assistant", "Me.", True)
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
        {"messages": SHAREGPT, "id": 3},
        {"conversations": SHAREGPT},
        {"conversations": [{"role": "human", "content": "Who?"}, {"role": "gpt", "content": "Me.", "name": "x"}]},
        {"instruction": "Who?", "input": "", "output": "Me."},
        {"instruction": "Who?", "output": "Me."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, SHAREGPT[1]]},
        {"messages": [SHAREGPT[0], SHAREGPT[1] | {"tool_calls": [], "reasoning_content": None, "weight": 1}]},
    ],
)
def test_every_form_of_a_conversation_is_the_same_one(record):
    assert spoken(record) == [ASKED, SAID]


def test_what_an_assistant_says_without_weight_is_seen_and_not_trained():
    again = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me.", "weight": 0}, *SHAREGPT]
    assert spoken({"messages": again}) == [ASKED, ("assistant", "Me.", False), ASKED, SAID]
    again[1] = {"role": "assistant", "content": "Me.", "train": False}
    assert spoken({"messages": again}) == [ASKED, ("assistant", "Me.", False), ASKED, SAID]
    assert "nothing that is trained" in spoken({"messages": again[:2]})


def test_an_alpaca_record_asks_with_its_input_and_a_developer_is_the_system():
    assert spoken({"instruction": "Add.", "input": "1, 2", "output": "3"})[0] == ("user", "Add.\n\n1, 2", True)
    assert spoken({"messages": [{"role": "developer", "content": "Be brief."}, *SHAREGPT]})[0][0] == "system"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, 'message 2: a call must be {"function": '),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud800"}}}]}, "surrogate"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "message 2: tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]}, "JSON object"),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
            "message 2: reasoning_content is not supported",
        ),
        ({"role": "tool", "content": "x"}, "behind each call comes one message of the tool, and nowhere else"),
        ({"role": "function", "content": "x"}, "message 2: the role function is not supported, only tool"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "a part of type image_url is not supported"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight must be 0 or 1"),
        ({"role": "assistant", "content": None}, "message 2: content is missing"),
    ],
)
def test_what_changes_the_meaning_of_a_message_is_refused_by_its_name(message, reason):
    assert reason in spoken({"messages": [SHAREGPT[0], message]})


@pytest.mark.parametrize("wrap", [list, json.dumps])
def test_calls_and_functions_come_along(wrap):
    function = {"name": "weather", "parameters": {"type": "object"}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "Cold."},
    ]
    record = {"messages": [SHAREGPT[0], *said], "tools": wrap([{"type": "function", "function": function}])}
    conversation = _parse_chat(record, Counter())
    assert conversation.tools == (json.dumps(function),)
    assert conversation.messages[1] == Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Oslo"}'),))
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert "tools must be a list" in spoken(record | {"tools": "5"})
    assert "a tool must be" in spoken(record | {"tools": [{"name": "weather"}]})


def test_fields_that_are_not_used_are_said_once_with_their_number(tmp_path, capsys):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"messages": [SHAREGPT[0] | {"name": "Ann"}, SHAREGPT[1]]}] * 3))
    assert len(list(chats([path], [].append))) == 3
    assert capsys.readouterr().err == "fields of messages that are not used: name (3)\n"
