"""Conversations that someone wrote down: .jsonl lines {"messages": [{"role": "user", "content": "..."}, ...]}."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanollm.sources.files import OnBad, find_files, problem, read_records
from nanollm.text.chat import Conversation, Message


def conversations(inputs: Sequence[Path], on_bad: OnBad) -> Iterator[Conversation]:
    """Each line that is a conversation in which the assistant speaks; any other goes to `on_bad`."""
    return read_records(find_files(inputs), ["messages"], _parse, on_bad)


def _parse(values: list[Any]) -> Conversation | str:
    """A conversation, or why it is none."""
    (messages,) = values
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "messages must be a list of objects with role and content"
    for number, message in enumerate(messages, start=1):
        if reason := problem([message.get("role"), message.get("content")], ["role", "content"]):
            return f"message {number}: {reason}"
    try:
        conversation = Conversation(tuple(Message(message["role"], message["content"]) for message in messages))
    except ValueError as error:
        return str(error)
    if all(message.role != "assistant" for message in conversation.messages):
        return "the assistant says nothing, so there is nothing to learn"
    return conversation
