"""Chat format: the ids of a conversation, which of them are trained, and the text of a reply.

<s> then, for each message, <|role|> content <|end|>. The marks are control symbols and each content is encoded by
itself, so no content can end a message or begin another. Trained: what the assistant says and the <|end|> after it.

Functions that the assistant may call are told behind the system's message: TOOL, a line of JSON for each, <|end|>. It
calls them behind its content: for each call CALL, a name, a space and a JSON object of arguments. What a function
returns is a message between TOOL and <|end|>.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from nanollm.text.tokenizer import ASSISTANT, CALL, END, SYSTEM, TOOL, USER, Tokenizer

Ids = npt.NDArray[np.integer]
Trained = npt.NDArray[np.bool_]
Role = Literal["system", "user", "assistant", "tool"]
Cut = Literal["dropped turns", "cut reply", "cut question"]


class Tool(Protocol):
    """What writes into a reply while a model writes it."""

    __name__: str

    def __call__(self, reply: str, /) -> str:
        """The text of a reply so far to what is appended to it; "" for nothing."""
        ...


MARK_OF: dict[str, str] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
TURNS = "an optional system message, then user and assistant in turn"
MIN_LIMIT = 9
"""Ids that no cut can spare: <s>, the marks around system message, functions and question, <|assistant|> and one id
after it."""
NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
"""Of a function."""


@dataclass(frozen=True)
class ToolCall:
    """The call of a function, of which somebody else takes care."""

    name: str
    arguments: str
    """A JSON object."""

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and NAME.fullmatch(self.name)):
            raise ValueError(f"a function's name must be 1 to 64 letters, digits, _ and -, got {self.name!r:.80}")
        if not self.arguments.startswith("{") or not isinstance(_parsed(self.arguments), dict):
            raise ValueError(f"the arguments of {self.name} must be a JSON object, got {self.arguments!r:.80}")

    @classmethod
    def of(cls, call: Any) -> Self:
        """From OpenAI's form; ValueError for any other. Its arguments may be a text or, as in data, an object."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
            raise ValueError(f'a call must be {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r:.80}')
        arguments = function["arguments"]
        return cls(function["name"], arguments.strip() if isinstance(arguments, str) else json_text(arguments))

    @property
    def text(self) -> str:
        """As the assistant writes it behind the mark."""
        return f"{self.name} {self.arguments}"


def json_text(value: Any) -> str:
    """A value as models read and write it."""
    return json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def function_text(tool: Any) -> str:
    """What a model reads of a function, from OpenAI's form: its name, description and parameters."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not NAME.fullmatch(str(function.get("name"))):
        raise ValueError(f'a tool must be {{"type": "function", "function": {{"name": ...}}}}, got {tool!r:.80}')
    read = ("name", "description", "parameters")
    return json_text({key: function[key] for key in read if function.get(key) is not None})


ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Any] | None
"""OpenAI's; {"type": "function", "function": {"name": ...}}: this one. None: auto."""


class Calls(NamedTuple):
    """What a reply may call."""

    functions: Sequence[Mapping[str, Any]] = ()  # in OpenAI's form
    is_required: bool = False
    is_parallel: bool = True  # whether it may call several

    @classmethod
    def of(cls, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, is_parallel: bool) -> Self:
        """As OpenAI says it; tools as `function_text` takes them. ValueError where tools and choice do not fit."""
        names = [tool["function"]["name"] for tool in tools]
        functions = {name: tool["function"] for name, tool in zip(names, tools, strict=True)}
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tools has the name {twice} twice")
        for name, function in functions.items():
            if (function.get("parameters") or {}).get("type", "object") != "object":
                raise ValueError(f"tools: the parameters of {name} must describe an object")
        if isinstance(choice, Mapping):
            if (name := (choice.get("function") or {}).get("name")) not in functions:
                raise ValueError(f"tool_choice names {name!r:.100}, tools has {', '.join(names) or 'none'}")
            return cls([functions[name]], is_required=True, is_parallel=False)
        if choice not in (None, "none", "auto", "required"):
            raise ValueError(f"tool_choice must be none, auto, required or name a function, got {choice!r:.100}")
        if choice == "required" and not names:
            raise ValueError("tool_choice required expects tools, got none")
        return cls() if choice == "none" else cls([*functions.values()], choice == "required", is_parallel)


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    is_trained: bool = True
    """Of the assistant: whether a model learns to say it, or only sees it."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of the assistant, behind what it says."""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        """From OpenAI's form."""
        calls = tuple(map(ToolCall.of, message.get("tool_calls") or ()))
        content: Any = "" if calls and message.get("content") is None else message.get("content")
        return cls(message["role"], content, tool_calls=calls)

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"a message's role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise ValueError(f"a message's content must be text, got {type(self.content).__name__}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the assistant calls functions, got calls of the {self.role}")
        if not (self.content or self.tool_calls or self.role == "tool"):
            raise ValueError(f"a message of the {self.role} is empty; give it at least one character, or leave it out")


@dataclass(frozen=True)
class Conversation:
    """Messages in turn: perhaps one of the system, then user, assistant, user, ...

    Behind the assistant's calls comes a message of the tool for each, and then the assistant again.
    """

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    """What the model reads of each function that it may call (`function_text`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        roles = [message.role for message in self.messages]
        if roles.count("system") > 1:
            raise ValueError(f"a conversation has at most one system message, got {roles.count('system')}; join them")
        turns = self.messages[1:] if roles[:1] == ["system"] else self.messages
        expected, calls = "user", 0  # calls that no message of the tool has answered yet
        for turn in turns:
            if turn.role != (expected := "tool" if calls else expected):
                break
            calls = calls - 1 if calls else len(turn.tool_calls)
            expected = "user" if turn.role == "assistant" else "assistant"
        else:
            expected = ""
        if (calls and roles[-1] != "assistant") or (expected and "tool" in roles):
            raise ValueError(
                f"behind each call comes one message of the tool, and nowhere else; got {', '.join(roles)}"
            )
        if not turns or expected:
            raise ValueError(f"a conversation is {TURNS}; got {', '.join(roles) or 'no messages'}")

    @classmethod
    def of(cls, question: str, answer: str | None = None) -> "Conversation":
        """One question of the user and one answer of the assistant; without the answer, a question to be answered."""
        asked = Message("user", question)
        return cls((asked,) if answer is None else (asked, Message("assistant", answer)))


@dataclass(frozen=True)
class Encoded:
    """Ids, and for each whether the model learns to predict it."""

    ids: list[int]
    trained: list[bool]


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> Encoded:
    """The ids of a conversation. What one of the tools writes into the assistant's words is encoded by itself, as the
    engine appends it, and not trained."""
    ids, trained = [tokenizer.bos_id], [False]
    end = tokenizer.mark_id(END)

    def add(encoded: list[int], is_trained: bool) -> None:
        ids.extend(encoded)
        trained.extend([is_trained] * len(encoded))

    for place, message in enumerate(conversation.messages):
        if conversation.tools and place == (conversation.messages[0].role == "system"):
            add([tokenizer.mark_id(TOOL), *tokenizer.encode("\n".join(conversation.tools)), end], False)
        add([tokenizer.mark_id(MARK_OF[message.role])], False)
        is_trained = message.role == "assistant" and message.is_trained
        parts = given_parts(message.content, tools) if tools and is_trained else [(message.content, False)]
        for part, is_given in parts:
            add(tokenizer.encode(part), is_trained and not is_given)
        for call in message.tool_calls:
            add([tokenizer.mark_id(CALL), *tokenizer.encode(call.text)], is_trained)
        add([end], is_trained)
    return Encoded(ids, trained)


def given_parts(text: str, tools: Sequence[Tool]) -> Iterator[tuple[str, bool]]:
    """A text in parts, and whether a tool would have written each, had it been asked after every character before.

    With a calculator "5*3=<<5*3=15>>15" gives ("5*3=<<5*3=", False), ("15>>", True), ("15", False).
    """
    begin = end = 0
    while end < len(text):
        end += 1
        given = next(filter(None, (tool(text[:end]) for tool in tools)), "")
        if given and text.startswith(given, end):
            yield text[begin:end], False
            yield given, True
            begin = end = end + len(given)
    if begin < len(text):
        yield text[begin:], False


def encode_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant replies: they end in <|assistant|>."""
    last = conversation.messages[-1]
    if last.role == "assistant":
        raise ValueError("a prompt must end with the user's message or a tool's, this one ends with the assistant's")
    return [*encode_conversation(conversation, tokenizer).ids, tokenizer.mark_id(ASSISTANT)]


def reply_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which a reply is over: <|end|>, and the </s> with which base models end a text."""
    return frozenset({tokenizer.mark_id(END), tokenizer.eos_id})


def reply_borders(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which what the assistant says is over: those that end a reply, and the marks that begin a message."""
    return reply_ends(tokenizer) | {token for token, name in tokenizer.symbols.items() if name in MARK_OF.values()}


def reply_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What the assistant said: the text of the ids up to the first at which that is over, or of all."""
    borders = reply_borders(tokenizer)
    length = next((place for place, token in enumerate(ids) if token in borders), len(ids))
    return tokenizer.decode_drawn(ids[:length])


def transcript(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What was said in a reply of several turns, a line for each message; the user's begin with "> "."""
    lines, message, is_user, borders = list[str](), list[int](), False, reply_borders(tokenizer)
    for token in [*ids, tokenizer.mark_id(END)]:
        if token not in borders:
            message.append(token)
            continue
        if message:
            lines.append("> " * is_user + tokenizer.decode_drawn(message))
        message, is_user = [], token == tokenizer.mark_id(USER)
    return "\n".join(lines)


class Marks(NamedTuple):
    """The ids of the marks, for code that sees ids only."""

    system: int
    user: int
    assistant: int
    end: int
    tool: int  # -1: a tokenizer that was imported may have none

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        tool = tokenizer.mark_id(TOOL) if TOOL in tokenizer.symbols.values() else -1
        system, user, assistant, end = map(tokenizer.mark_id, (SYSTEM, USER, ASSISTANT, END))
        return cls(system, user, assistant, end, tool)


@dataclass(frozen=True)
class Shortened:
    """A conversation that fits, and what that took."""

    ids: Ids  # (n,)
    trained: Trained  # (n,)
    cuts: tuple[Cut, ...] = ()


def shorten(ids: Ids, trained: Trained, limit: int, marks: Marks) -> Shortened:
    """Cut an encoded conversation to at most `limit` ids so that it still asks something and answers it.

    First the oldest exchanges after the system's message go, and a last question that nobody answers. If one exchange
    is left and too long, its reply loses its end, but keeps a quarter of `limit`; a reply that was cut has no <|end|>,
    so the model does not learn to stop there. If that is not enough, the longer of question and system message, and
    then both, lose their middle: a question's beginning states the task, its end often the input.
    ValueError if `limit` is below MIN_LIMIT.
    """
    if limit < MIN_LIMIT:
        raise ValueError(f"a conversation needs room for at least {MIN_LIMIT} ids, got {limit}; give a longer context")
    if len(ids) <= limit:
        return Shortened(ids, trained)
    keep = _without_old_turns(ids, limit, marks)
    ids, trained = ids[keep], trained[keep]
    cuts: tuple[Cut, ...] = () if keep.all() else ("dropped turns",)
    if len(ids) > limit:
        keep, more = _within_one_exchange(ids, limit, marks)
        ids, trained, cuts = ids[keep], trained[keep], cuts + more
    return Shortened(ids, trained, cuts)


def _without_old_turns(ids: Ids, limit: int, marks: Marks) -> Trained:
    """Which ids stay: the beginning up to the first question, then as many of the newest exchanges as fit, or one."""
    questions = np.flatnonzero(ids == marks.user)  # exchange i runs from question i to the next
    replies = np.flatnonzero(ids == marks.assistant)
    end = len(ids)
    if 0 < len(replies) < len(questions):
        end, questions = questions[-1], questions[:-1]
    fits = questions[0] + end - questions <= limit  # by the first exchange that stays; true from some place on
    first = questions[fits.argmax() if fits.any() else -1]
    places = np.arange(len(ids))
    return (places < questions[0]) | ((first <= places) & (places < end))


def _within_one_exchange(ids: Ids, limit: int, marks: Marks) -> tuple[Trained, tuple[Cut, ...]]:
    """Which ids of [system,] question [and reply] stay: exactly `limit` of them."""
    keep = np.ones(len(ids), dtype=np.bool_)
    replies = np.flatnonzero(ids == marks.assistant)
    head = replies[0] + 1 if len(replies) else len(ids)  # what comes before the reply
    reply = len(ids) - head
    least = min(reply, max(1, limit // 4))
    kept = min(reply, max(least, limit - head))
    keep[head + kept :] = False
    cuts: tuple[Cut, ...] = ("cut reply",) if kept < reply else ()
    if (excess := head + kept - limit) > 0:
        starts = np.flatnonzero(np.isin(ids[:head], (marks.system, marks.tool, marks.user))) + 1
        ends = np.flatnonzero(ids[:head] == marks.end)
        for start, end, room in zip(starts, ends, _rooms(ends - starts, excess), strict=True):
            keep[start + (room + 1) // 2 : end - room // 2] = False
        cuts = (*cuts, "cut question")
    return keep, cuts


def _rooms(lengths: Ids, excess: int) -> list[int]:
    """New lengths of one to three messages, `excess` less in all: the longest give until they are equal."""
    room, rooms = int(lengths.sum()) - excess, [0] * len(lengths)
    for left, place in zip(range(len(lengths), 0, -1), np.argsort(lengths, kind="stable").tolist(), strict=True):
        rooms[place] = min(int(lengths[place]), room // left)
        room -= rooms[place]
    return rooms


TEMPLATE = Path(__file__).with_name("chat.jinja")
"""What transformers and the engines that read its templates render: tokenised with the marks recognised, the text gives
the ids of encode_conversation and encode_prompt. Those can hold a message that spells a mark, because each content is
encoded by itself; a template is one text and cannot, so it refuses such a message. There is no {% generation %} around
the assistant's words: only transformers knows that tag, and plain jinja2 stops at it."""


def template_for(symbols: Iterable[str]) -> str:
    """The template that refuses these in a message: `Tokenizer.symbols`, since a model that was imported has others."""
    text = TEMPLATE.read_text("utf-8").strip()
    text = text.replace("TURNS", TURNS).replace("'TOOL'", repr(TOOL)).replace("'CALL'", repr(CALL))
    return text.replace("MARKS", json.dumps(list(symbols), ensure_ascii=False))
