"""Datasets of the Hugging Face hub, and copies of them in files, as documents or conversations.

The `datasets` library streams the rows one by one and keeps nothing. A dataset's name may also be a local folder of
Parquet files, which the same library reads in the same way.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from nanollm.progress import say
from nanollm.sources.files import BadRecord, OnBad, Row, find_files, need, problem, read_records, read_rows
from nanollm.text.chat import Conversation, Message, ToolCall, function_text

OPENWEBTEXT = "Skylion007/openwebtext"
SUPER_NATURAL_INSTRUCTIONS = "andersonbcdefg/supernatural-instructions-2m"


def openwebtext(inputs: Sequence[Path] | None, on_bad: OnBad, name: str = OPENWEBTEXT) -> Iterator[str]:
    """Pages that people linked to, from files or folders, or from the hub where `inputs` is None."""
    for (text,) in rows_of(inputs, name, "train", ["text"], on_bad):
        yield text


def super_natural_instructions(
    inputs: Sequence[Path] | None, split: str, on_bad: OnBad, name: str = SUPER_NATURAL_INSTRUCTIONS
) -> Iterator[Conversation]:
    """Two million tasks with an input and the expected output, one turn each; all are in the split "train"."""
    for prompt, response in rows_of(inputs, name, split, ("prompt", "response"), on_bad):
        yield Conversation.of(prompt, response)


def chats(inputs: Sequence[Path], on_bad: OnBad) -> Iterator[Conversation]:
    """Conversations in which the assistant says something that is trained.

    Records are {"messages": [{"role": ..., "content": ...}, ...]} as OpenAI writes them, {"conversations": [{"from":
    ..., "value": ...}, ...]} (ShareGPT) or {"instruction": ..., "input": ..., "output": ...} (Alpaca). "tools", a list
    or its JSON, are functions that the assistant may call. Fields of messages that are not used are said at the end.
    """
    unused = Counter[str]()
    yield from read_records(find_files(inputs), [], lambda values: _parse_chat(values[0], unused), on_bad)
    _say_unused(unused)


def _say_unused(unused: Counter[str]) -> None:
    if unused:
        fields = ", ".join(f"{name} ({number:,})" for name, number in unused.most_common(5))
        say(f"fields of messages that are not used: {fields}")


def _parse_chat(record: dict[str, Any], unused: Counter[str]) -> Conversation | str:
    """A conversation, or why it is none."""
    if "messages" in record or "conversations" in record:
        messages = record.get("messages", record.get("conversations"))
    elif "instruction" in record and "output" in record:
        asked = [part for part in (record["instruction"], record.get("input")) if part]
        if reason := problem([*asked, record["output"]], [*["instruction"] * len(asked), "output"]):
            return reason
        messages = [{"from": "human", "value": "\n\n".join(asked)}, {"from": "gpt", "value": record["output"]}]
    else:
        return f"no messages, conversations, or instruction and output here, only {', '.join(record) or 'nothing'}"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "messages must be a list of objects with role and content"
    parsed = []
    for number, message in enumerate(messages, start=1):
        if isinstance(each := _parse_message(message, unused), str):
            return f"message {number}: {each}"
        parsed.append(each)
    tools = record.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools, list):
            return f"tools must be a list, got {tools!r:.80}"
        functions = tuple(map(function_text, tools))
        if reason := problem(functions, ["tools"] * len(functions)):
            return reason
        conversation = Conversation(tuple(parsed), functions)
    except ValueError as error:
        return str(error)
    if not any(message.role == "assistant" and message.is_trained for message in conversation.messages):
        return "the assistant says nothing that is trained, so there is nothing to learn"
    return conversation


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
"""Other names for a role."""
NOT_SUPPORTED = ("function_call", "reasoning_content", "reasoning", "thinking", "audio")
"""Fields without which a message means something else."""


def _parse_message(message: dict[str, Any], unused: Counter[str]) -> Message | str:
    """One message in any of these forms, or why it cannot be used."""
    given = {name: value for name, value in message.items() if value is not None}
    role, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
    weight, train = given.pop("weight", 1), given.pop("train", True)
    if named := [name for name in NOT_SUPPORTED if given.get(name)]:
        return f"{named[0]} is not supported"
    if role == "function":
        return "the role function is not supported, only tool"
    calls, _ = given.pop("tool_calls", ()), given.pop("tool_call_id", None)  # answers come in the order of the calls
    if not isinstance(calls, list | tuple):
        return f"tool_calls must be a list, got {calls!r:.80}"
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            return f"a part of type {other[0]} is not supported, only text"
        content = "".join(str(part.get("text", "")) for part in content)
    if weight not in (0, 1) or not isinstance(train, bool):
        return f"weight must be 0 or 1 and train true or false, got {weight!r} and {train!r}"
    may_be_empty = not content and (calls or role == "tool")
    unused.update(given.keys())
    try:
        made = tuple(map(ToolCall.of, calls))
        texts = [("role", role), ("content", content)][: 1 if may_be_empty else 2] + [
            ("call", each.text) for each in made
        ]
        if reason := problem([text for _, text in texts], [name for name, _ in texts]):
            return reason
        return Message(ROLES.get(role, role), content or "", is_trained=bool(weight) and train, tool_calls=made)
    except ValueError as error:
        return str(error)


class Reply(NamedTuple):
    """A reply that somebody judged; it may be empty."""

    text: str
    ends: bool = True
    """Whether it was over there. One that was cut off has no end mark."""


@dataclass(frozen=True)
class Preference:
    """The reply to a prompt that was preferred and the one that was not, or one of them alone."""

    prompt: tuple[Message, ...]
    chosen: Reply | None = None
    rejected: Reply | None = None


Rolled = tuple[str, float, Reply]
"""Of a rollout: the question, the reward and the reply."""


def preferences(inputs: Sequence[Path], on_bad: OnBad) -> Iterator[Preference]:
    """Preferences in TRL's forms, or made of rollouts of nanollm grpo.

    Records are {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "completion": ..., "label": true or
    false}. Each is a text or a list of messages; of messages, the last is the reply, and the prompt may stand before it
    in both lists. Of the replies to a problem in one file of rollouts, the best goes with the worst, the second best
    with the second worst, and so on while their rewards differ.
    """
    unused = Counter[str]()
    for path in find_files(inputs):
        rollouts = dict[str, list[tuple[float, Reply]]]()
        records: Iterator[Preference | Rolled] = read_records(
            [path], [], lambda values: _parse_preference(values[0], unused), on_bad
        )
        for each in records:
            if isinstance(each, tuple):
                rollouts.setdefault(each[0], []).append(each[1:])
            else:
                yield each
        for question, replies in rollouts.items():
            replies.sort(key=lambda graded: -graded[0])
            for (high, better), (low, worse) in zip(replies, reversed(replies), strict=True):
                if high > low:
                    yield Preference((Message("user", question),), better, worse)
    _say_unused(unused)


def _parse_preference(record: dict[str, Any], unused: Counter[str]) -> Preference | Rolled | str:
    """A preference, a rollout, or why it is neither."""
    if "reply" in record:
        return _parse_rollout(record)
    parsed = list[tuple[tuple[Message, ...], Reply]]()
    for name in ("completion",) if "label" in record else ("chosen", "rejected"):
        if name not in record:
            known = ", ".join(record) or "nothing"
            return f"expected prompt, chosen and rejected, or prompt, completion and label, got {known}"
        asked, said = record.get("prompt") or [], record[name]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
        for field, given in (("prompt", asked), (name, said)):
            if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
                return f"{field}: expected text or a list of messages with role and content, got {given!r}"
        if isinstance(each := _parse_exchange(asked, said, unused), str):
            return f"{name}: {each}"
        parsed.append(each)
    prompt, reply = parsed[0]
    if "label" not in record:
        other, rejected = parsed[1]
        return (
            Preference(prompt, reply, rejected) if prompt == other else "chosen and rejected answer different prompts"
        )
    if not isinstance(record["label"], bool):
        return f"label must be true or false, got {record['label']!r}"
    return Preference(prompt, chosen=reply) if record["label"] else Preference(prompt, rejected=reply)


def _parse_exchange(
    asked: list[dict[str, Any]], said: list[dict[str, Any]], unused: Counter[str]
) -> tuple[tuple[Message, ...], Reply] | str:
    """The messages of a prompt and the reply to them, or what is wrong."""
    *before, last = [*asked, *said] or [{}]
    parsed = list[Message]()
    is_empty = isinstance(text := last.get("content"), str) and not text.strip()  # for the caller to count
    for number, message in enumerate([*before, last | {"content": "-"} if is_empty else last], start=1):
        if isinstance(each := _parse_message(message, unused), str):
            return f"message {number}: {each}"
        if each.tool_calls:
            return f"message {number}: tool_calls is not supported in preferences"
        parsed.append(replace(each, is_trained=False))
    try:
        Conversation(tuple(parsed))
    except ValueError as error:
        return str(error)
    if parsed[-1].role != "assistant":
        return "the last message must be the assistant's"
    return tuple(parsed[:-1]), Reply("" if is_empty else parsed[-1].content)


def _parse_rollout(record: dict[str, Any]) -> Rolled | str:
    """A line that nanollm grpo wrote, or what is wrong."""
    question, reply, reward = (record.get(name) for name in ("question", "reply", "reward"))
    if reason := problem([question], ["question"]):
        return reason
    is_number = reward is None or (isinstance(reward, int | float) and not math.isnan(reward))
    if not isinstance(reply, str) or "reward" not in record or not is_number:
        return f"expected a reply of text and a reward, a number or null, got {reply!r} and {reward!r}"
    if record.get("turns"):
        return "a conversation with an environment has no single reply to prefer"
    return str(question), float("-inf") if reward is None else reward, Reply(reply, record.get("stop") != "length")


def rows_of(
    inputs: Sequence[Path] | None, name: str, split: str, columns: Sequence[str], on_bad: OnBad
) -> Iterator[Row]:
    """The columns' values from files or folders, or from a dataset of the hub where `inputs` is None."""
    return (
        stream_rows(name, split, columns, on_bad) if inputs is None else read_rows(find_files(inputs), columns, on_bad)
    )


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
