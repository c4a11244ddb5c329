"""Datasets of the Hugging Face hub, and copies of them in files, as documents or conversations.

The `datasets` library streams the rows one by one and keeps nothing. A dataset's name may also be a local folder of
Parquet files, which the same library reads in the same way.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from nanollm.sources.files import BadRecord, OnBad, Row, find_files, need, problem, read_records, read_rows, read_texts
from nanollm.text.chat import Conversation, Message

OPENWEBTEXT = "Skylion007/openwebtext"
SUPER_NATURAL_INSTRUCTIONS = "andersonbcdefg/supernatural-instructions-2m"


def openwebtext(inputs: Sequence[Path] | None, on_bad: OnBad, name: str = OPENWEBTEXT) -> Iterator[str]:
    """Pages that people linked to, from files or folders, or from the hub where `inputs` is None."""
    if inputs is not None:
        yield from read_texts(find_files(inputs), "text", on_bad)
    else:
        for (text,) in stream_rows(name, "train", ["text"], on_bad):
            yield text


def super_natural_instructions(
    inputs: Sequence[Path] | None, split: str, on_bad: OnBad, name: str = SUPER_NATURAL_INSTRUCTIONS
) -> Iterator[Conversation]:
    """Two million tasks with an input and the expected output, one turn each; all are in the split "train"."""
    columns = ("prompt", "response")
    if inputs is None:
        rows = stream_rows(name, split, columns, on_bad)
    else:
        rows = read_rows(find_files(inputs), columns, on_bad)
    for prompt, response in rows:
        yield Conversation.of(prompt, response)


def chats(inputs: Sequence[Path], on_bad: OnBad) -> Iterator[Conversation]:
    """The lines {"messages": [{"role": "user", "content": "..."}, ...]} in which the assistant speaks."""
    return read_records(find_files(inputs), ["messages"], _parse_chat, on_bad)


def _parse_chat(values: list[Any]) -> Conversation | str:
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


def stream_rows(
    name: str, split: str, columns: Sequence[str], on_bad: OnBad, config_name: str | None = None
) -> Iterator[Row]:
    """The values of the columns for each row where all of them are text; the other rows go to `on_bad`, by number."""
    rows = iter(_open(name, split, config_name))
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever the network or a broken file raises
            raise OSError(f"{name} ({split}) broke off at row {number}: {one_line(error)}; try again later") from error
        if absent := [column for column in columns if column not in row]:
            there = ", ".join(row)
            raise ValueError(f"{name} has no column {' or '.join(absent)}, only {there}; choose with --text_column")
        values = tuple(row[column] for column in columns)
        if reason := problem(values, columns):
            on_bad(BadRecord(f"{name}:{split}", number, reason))
        else:
            yield values


def _open(name: str, split: str, config_name: str | None) -> Any:
    datasets = need("datasets", f"to read {name} from the hub")
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=True)
    except Exception as error:  # no such name, no network, no access, an old script, ...
        raise ValueError(
            f"cannot open the dataset {name} ({split}): {one_line(error)}; check the name, the split and the network, "
            f"or give files instead"
        ) from error


def one_line(error: Exception) -> str:
    """What the network or a library raised, short enough for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
