import json

import pytest

from nanollm.sources.chats import conversations
from nanollm.sources.files import BadRecord
from nanollm.text.chat import Conversation, Message

QUESTION, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": " Me.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_messages_become_conversations_word_for_word(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in [[QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER]]))
    bad = []
    assert list(conversations([tmp_path], bad.append)) == [
        Conversation.of("Who?", " Me.\n"),
        Conversation((Message("system", "Be brief."), Message("user", "Who?"), Message("assistant", " Me.\n"))),
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "malformed JSON"),
        ('{"text": "x"}', "no messages here, only text"),
        ('{"messages": "x"}', "messages must be a list of objects"),
        (json.dumps({"messages": []}), "got no messages"),
        (json.dumps({"messages": [QUESTION]}), "the assistant says nothing"),
        (json.dumps({"messages": [QUESTION, QUESTION]}), "user and assistant in turn; got user, user"),
        (json.dumps({"messages": [QUESTION, {"role": "robot", "content": "x"}]}), "role must be one of"),
        (json.dumps({"messages": [QUESTION, {"role": "assistant"}]}), "message 2: content is missing"),
        (json.dumps({"messages": [QUESTION, ANSWER | {"content": ""}]}), "message 2: content is empty"),
        (json.dumps({"messages": [QUESTION, ANSWER | {"content": [ANSWER]}]}), "message 2: content must be text"),
        (json.dumps({"messages": [SYSTEM, SYSTEM, QUESTION, ANSWER]}), "at most one system message, got 2"),
        (json.dumps({"messages": [QUESTION, SYSTEM, ANSWER]}), "user and assistant in turn; got user, system, assist"),
        (
            json.dumps({"messages": [QUESTION, ANSWER | {"content": "\ud800"}]}),
            "message 2: content is not valid Unicode",
        ),
    ],
)
def test_what_is_no_conversation_is_reported_with_file_and_line(tmp_path, line, reason):
    good = json.dumps({"messages": [QUESTION, ANSWER]})
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    bad: list[BadRecord] = []
    assert list(conversations([path], bad.append)) == [Conversation.of("Who?", " Me.\n")] * 2
    assert [(record.path, record.line) for record in bad] == [(str(path), 3)]
    assert reason in bad[0].reason


def test_a_file_without_conversations_is_reported(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n")
    bad: list[BadRecord] = []
    assert list(conversations([path], bad.append)) == []
    assert bad == [BadRecord(str(path), 0, "holds no records")]
