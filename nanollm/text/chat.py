"""Chat format: the ids of a conversation, which of them are trained, and the text of a reply.

<s> then, for each message, <|role|> content <|end|>. The marks are control symbols and each content is encoded by
itself, so no content can end a message or begin another. Trained: what the assistant says and the <|end|> after it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from nanollm.text.tokenizer import ASSISTANT, END, MARKS, SYSTEM, USER, Tokenizer

Ids = npt.NDArray[np.integer]
Trained = npt.NDArray[np.bool_]
Role = Literal["system", "user", "assistant"]
Cut = Literal["dropped turns", "cut reply", "cut question"]


class Tool(Protocol):
    """What writes into a reply while a model writes it."""

    __name__: str

    def __call__(self, reply: str, /) -> str:
        """The text of a reply so far to what is appended to it; "" for nothing."""
        ...


MARK_OF: dict[str, str] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
TURNS = "an optional system message, then user and assistant in turn"
MIN_LIMIT = 7
"""Ids that no cut can spare: <s>, the marks around system message and question, <|assistant|> and one id after it."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    is_trained: bool = True
    """Of the assistant: whether a model learns to say it, or only sees it."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"a message's role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise ValueError(f"a message's content must be text, got {type(self.content).__name__}")
        if not self.content:
            raise ValueError(f"a message of the {self.role} is empty; give it at least one character, or leave it out")


@dataclass(frozen=True)
class Conversation:
    """Messages in turn: perhaps one of the system, then user, assistant, user, ..."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        roles = [message.role for message in self.messages]
        if roles.count("system") > 1:
            raise ValueError(f"a conversation has at most one system message, got {roles.count('system')}; join them")
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or any(role != ("user", "assistant")[turn % 2] for turn, role in enumerate(turns)):
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
    for message in conversation.messages:
        ids.append(tokenizer.mark_id(MARK_OF[message.role]))
        trained.append(False)
        is_trained = message.role == "assistant" and message.is_trained
        parts = given_parts(message.content, tools) if tools and is_trained else [(message.content, False)]
        for part, is_given in parts:
            encoded = tokenizer.encode(part)
            ids += encoded
            trained += [is_trained and not is_given] * len(encoded)
        ids.append(end)
        trained.append(is_trained)
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
    if conversation.messages[-1].role != "user":
        raise ValueError("a prompt must end with the user's message, this one ends with the assistant's")
    return [*encode_conversation(conversation, tokenizer).ids, tokenizer.mark_id(ASSISTANT)]


def reply_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which a reply is over: <|end|>, and the </s> with which base models end a text."""
    return frozenset({tokenizer.mark_id(END), tokenizer.eos_id})


def reply_borders(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which what the assistant says is over: those that end a reply, and the marks that begin a message."""
    return reply_ends(tokenizer) | {tokenizer.mark_id(mark) for mark in MARK_OF.values()}


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

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        return cls(*(tokenizer.mark_id(mark) for mark in (SYSTEM, USER, ASSISTANT, END)))


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
        starts = np.flatnonzero((ids[:head] == marks.system) | (ids[:head] == marks.user)) + 1
        ends = np.flatnonzero(ids[:head] == marks.end)
        for start, end, room in zip(starts, ends, _rooms(ends - starts, excess), strict=True):
            keep[start + (room + 1) // 2 : end - room // 2] = False
        cuts = (*cuts, "cut question")
    return keep, cuts


def _rooms(lengths: Ids, excess: int) -> list[int]:
    """New lengths of one or two messages, `excess` less in all: the longer gives until both are equal."""
    room = int(lengths.sum()) - excess
    if len(lengths) == 1:
        return [room]
    first, second = map(int, lengths)
    shorter = min(first, second, room // 2)
    return [shorter, room - shorter] if first <= second else [room - shorter, shorter]


# What transformers and the engines that read its templates render: tokenised with the marks recognised, the text gives
# the ids of encode_conversation and encode_prompt. Those can hold a message that spells a mark, because each content is
# encoded by itself; a template is one text and cannot, so it refuses such a message. There is no {% generation %}
# around the assistant's words: only transformers knows that tag, and plain jinja2 stops at it.
_TEMPLATE = """
{%- set marks = MARKS -%}
{%- set first = 1 if messages and messages[0]['role'] == 'system' else 0 -%}
{%- if messages | length == first -%}
  {{- raise_exception('a conversation is TURNS; this one asks nothing') -}}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set number = loop.index -%}
  {%- set turn = ['user', 'assistant'][(loop.index0 - first) % 2] -%}
  {%- set role = 'system' if loop.index0 < first else turn -%}
  {%- if message['role'] != role -%}
    {{- raise_exception('a conversation is TURNS; message ' ~ number ~ ' must have the role ' ~ role) -}}
  {%- endif -%}
  {%- if message['content'] is not string or not message['content'] -%}
    {{- raise_exception('the content of message ' ~ number ~ ' must be text of at least one character') -}}
  {%- endif -%}
  {%- for mark in marks -%}
    {%- if mark in message['content'] -%}
      {{- raise_exception('message ' ~ number ~ ' spells the mark ' ~ mark ~ '; change it') -}}
    {%- endif -%}
  {%- endfor -%}
  {{- '<|' ~ role ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if messages[-1]['role'] != 'user' -%}
    {{- raise_exception('a prompt must end with a message of the user') -}}
  {%- endif -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
""".strip()


def template_for(symbols: Iterable[str]) -> str:
    """The template that refuses these in a message: `Tokenizer.symbols`, since a model that was imported has others."""
    return _TEMPLATE.replace("TURNS", TURNS).replace("MARKS", json.dumps(list(symbols), ensure_ascii=False))


TEMPLATE = template_for(["<pad>", "<unk>", "<s>", "</s>", *MARKS])
