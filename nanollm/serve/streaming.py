"""From sampled tokens to what a client reads: text and log-probabilities of each choice, as JSON at once or as events.

A stream of server-sent events ends with [DONE], or with an error event. When the reader hangs up, the engine is told to
stop. A token is spoken of once some of its text is out, so that what a stop text cuts off is never mentioned.
"""

import asyncio
import json
import logging
import time
import uuid
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanollm.generate.request import TokenLogprobs
from nanollm.serve.engine_thread import EngineThread, Submission, TokenEvent
from nanollm.serve.metrics import Metrics
from nanollm.serve.protocol import ApiError, FinishReason, Json, error_body
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_LOGPROB = -9999.0  # JSON has no minus infinity


# --- tokens become text ---


class Detokenizer:
    """The name and the bytes of each id, as a client should see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = tokenizer.symbols
        self.spell = cache(self._spell)

    def _spell(self, token: int) -> tuple[str, bytes]:
        """No two ids share a name. A mark has no bytes; a part of a character is named by its byte."""
        spelled = self.tokenizer.bytes_of(token)
        if token in self._names or token >= self.tokenizer.vocab_size:
            return self._names.get(token, f"<{token}>"), b""
        if not self.tokenizer.is_byte(token):
            return spelled.decode(), spelled
        # Where a learned piece spells the same character, the byte piece is named by its byte, too.
        is_character = spelled.isascii() and self.tokenizer.encode(spelled.decode()) == [token]
        return spelled.decode() if is_character else f"bytes:\\x{spelled[0]:02x}", spelled


@dataclass(frozen=True)
class LogprobEntry:
    """A token and how likely it was."""

    token: int
    logprobs: TokenLogprobs | None  # None: of the first of a prompt nothing is known
    offset: int  # where in the text it begins, in characters


@dataclass
class Delta:
    """What is new of a choice: its text was sampled, or given by a tool, or belongs to the arguments of one call."""

    index: int
    text: str = ""
    is_given: bool = False
    call: int | None = None  # the number of the call
    name: str = ""  # of the function, where its call begins
    calls: list[Json] = field(default_factory=list)  # of a whole answer
    entries: list[LogprobEntry] = field(default_factory=list)
    finish: FinishReason | None = None


class Choice:
    """One of the replies to a request, from its first token to its last; `echo` are ids that come before it."""

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        call_id: int | None = None,
        echo: Sequence[int] = (),
        *,
        has_reply: bool = True,
    ) -> None:
        """call_id: the mark before a call, where there may be some; has_reply: false where the echo is all, and the
        only token sampled is dropped."""
        self.index, self._call_id = index, call_id
        self._names: dict[int, str] = {}  # what is known of the name of each call; a space ends it
        self.tokens = 0  # tokens sampled, an end token among them not counted
        self._tokenizer, self._echo, self._has_reply = detokenizer.tokenizer, echo, has_reply
        self._shift = 0  # characters of the echo
        self._text = TextStream(self._tokenizer, stops)
        self._pending: deque[TokenEvent] = deque()
        self._is_given: list[bool] = []  # of each token
        self._calls: list[int] = []  # the number of the call that each token belongs to; -1: none
        self._emitted = 0

    def take(self, events: Sequence[TokenEvent]) -> list[Delta]:
        """What these tokens add to the text, in one or more parts, and which tokens may be spoken of now."""
        echo = self._take_echo(events)
        begin = len(self._text.text)
        finish: FinishReason | None = None
        for event in events:
            if event.finish != "end" and self._has_reply:
                self.tokens += 1
                self._pending.append(event)
                self._is_given.append(event.is_given)
                latest = self._calls[-1] if self._calls else -1
                self._calls.append(latest + (event.token == self._call_id))
                self._text.push(event.token)
            if event.finish is not None:
                self._text.close()
                is_cut = event.finish == "length" or not self._has_reply
                finish = "length" if is_cut and not self._text.is_stopped else "stop"
        if finish == "stop" and not self._text.is_stopped and self._calls and self._calls[-1] >= 0:
            finish = "tool_calls"
        sizes, deltas = zip(*self._parts(begin), strict=True)
        place, end = 0, self._shift + begin + sizes[0]
        for entry in self._emit(everything=finish is not None and not self._text.is_stopped):
            while entry.offset >= end and place < len(deltas) - 1:
                place += 1
                end += sizes[place]
            deltas[place].entries.append(entry)
        deltas[-1].finish = finish
        return [*echo, *deltas]

    def _take_echo(self, events: Sequence[TokenEvent]) -> list[Delta]:
        """The text of the echo, and how likely its tokens are, with the first event."""
        if not (events and self._echo):
            return []
        stream, ids, self._echo, first = TextStream(self._tokenizer), self._echo, (), events[0]
        for token in ids:
            stream.push(token)
        stream.close()
        self._shift = len(stream.text)
        known = zip(ids, [None, *first.prompt_logprobs], stream.begins, strict=True) if first.logprobs else ()
        return [Delta(self.index, stream.text, entries=[LogprobEntry(*each) for each in known])]

    def _parts(self, begin: int) -> list[tuple[int, Delta]]:
        """The text from there on, cut where the model and a tool take turns, and calls begin; with lengths."""
        text, begins = self._text.text, self._text.begins

        def kind(place: int) -> tuple[bool, int]:
            token = bisect_right(begins, place) - 1
            return self._is_given[token], self._calls[token]

        deltas = list[tuple[int, Delta]]()
        for (is_given, call), places in groupby(range(begin, len(text)), kind):
            part = "".join(text[place] for place in places)
            deltas.append((len(part), Delta(self.index, part, is_given) if call < 0 else self._call(call, part)))
        return deltas or [(0, Delta(self.index))]

    def _call(self, call: int, part: str) -> Delta:
        """More of a call: its name is told when all of it is there."""
        name, is_known = self._names.get(call, ""), " " in self._names.get(call, "")
        if is_known:
            return Delta(self.index, part, call=call)
        name, space, arguments = (name + part).partition(" ")
        self._names[call] = name + space
        return Delta(self.index, arguments, call=call, name=name if space else "")

    def _emit(self, *, everything: bool) -> list[LogprobEntry]:
        """Of the pending tokens, those that begin in the text that is out, or all."""
        begins = self._text.begins
        end = len(begins) if everything else bisect_left(begins, len(self._text.text), self._emitted)
        ready = [(self._pending.popleft(), begin + self._shift) for begin in begins[self._emitted : end]]
        self._emitted = end
        return [
            LogprobEntry(event.token, event.logprobs, begin) for event, begin in ready if event.logprobs is not None
        ]


class Generation:
    """All choices of one HTTP request, until its deadline."""

    def __init__(
        self, engine: EngineThread, metrics: Metrics, submission: Submission, choices: list[Choice], deadline_s: float
    ) -> None:
        self.choices = choices
        self.deadline_s = deadline_s
        self.deadline = asyncio.get_running_loop().time() + deadline_s
        self.unfinished = len(choices)
        self._engine, self._metrics, self._submission = engine, metrics, submission
        self._began = time.perf_counter()
        self._first_at: float | None = None

    @property
    def usage(self) -> Json:
        """Tokens of all prompts (the samples of a prompt share it, as one object) and of all replies."""
        prompts = {id(request.prompt): len(request.prompt) for request in self._submission.requests}
        read, written = sum(prompts.values()), sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def next_deltas(self) -> list[Delta]:
        """Wait for tokens: deltas of each choice that has some. ApiError when no more will come."""
        try:
            async with asyncio.timeout_at(self.deadline):
                events = await self._submission.events()
        except TimeoutError:
            raise ApiError(504, f"the reply was not complete after {self.deadline_s:g} seconds; ask for less") from None
        deltas = [
            delta
            for index in sorted({event.index for event in events})
            for delta in self.choices[index].take([event for event in events if event.index == index])
        ]
        self.unfinished -= sum(delta.finish is not None for delta in deltas)
        self._measure(events[0].at, events[-1].at)
        return deltas

    async def collect(self) -> list[Delta]:
        """Everything until the end, one delta for each choice."""
        whole = [Delta(choice.index) for choice in self.choices]
        while self.unfinished:
            for delta in await self.next_deltas():
                if delta.name:
                    whole[delta.index].calls.append(called(delta.name))
                if delta.call is None:
                    whole[delta.index].text += delta.text
                elif whole[delta.index].calls:
                    whole[delta.index].calls[-1]["function"]["arguments"] += delta.text
                whole[delta.index].entries += delta.entries
                whole[delta.index].finish = delta.finish
        return whole

    def close(self) -> None:
        """Give up what is not complete."""
        if self.unfinished:
            self._engine.cancel(self._submission)
            self.unfinished = 0

    def _measure(self, first_at: float, last_at: float) -> None:
        if self._first_at is None:
            self._first_at = first_at
            self._metrics.first_token_s.observe(first_at - self._began)
        later = sum(choice.tokens for choice in self.choices) - len(self.choices)
        if not self.unfinished and later > 0:
            self._metrics.token_s.observe((last_at - self._first_at) * len(self.choices) / later)


# --- text becomes JSON ---


def called(name: str, arguments: str = "") -> Json:
    """A call that begins, with an id to answer to."""
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


class Formatter(ABC):
    """Writes the choices of one request as OpenAI's JSON, whole or in the chunks of a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, detokenizer: Detokenizer, *, has_logprobs: bool, has_experts: bool = False) -> None:
        self.detokenizer = detokenizer
        self.has_logprobs, self.has_experts = has_logprobs, has_experts
        self.model = model
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, generation: Generation, deltas: Sequence[Delta]) -> Json:
        """The answer at once."""
        return self.message(self.kind, [self.choice(delta) for delta in deltas]) | {"usage": generation.usage}

    def chunks(self, delta: Delta, *, is_first: bool) -> list[Json]:
        """Some of a choice, as one or two chunks of a stream: the reason why it ended comes by itself."""
        choices = []
        if delta.text or delta.entries or delta.name or is_first:
            choices.append(self.chunk_choice(replace(delta, finish=None), is_first=is_first))
        if delta.finish is not None:
            choices.append(self.chunk_choice(Delta(delta.index, finish=delta.finish), is_first=False))
        return [self.message(self.chunk_kind, [choice]) for choice in choices]

    def message(self, kind: str, choices: list[Json]) -> Json:
        """What is sent at once, or as an event; usage is added to it."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @abstractmethod
    def choice(self, delta: Delta) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def chunk_choice(self, delta: Delta, *, is_first: bool) -> Json:
        """A choice of a chunk."""


class ChatFormatter(Formatter):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.calls:
            message |= {"content": delta.text or None, "tool_calls": delta.calls}
        logprobs = {"content": [self._token(entry) for entry in delta.entries]} if self.has_logprobs else None
        return {"index": delta.index, "message": message, "logprobs": logprobs, "finish_reason": delta.finish}

    def chunk_choice(self, delta: Delta, *, is_first: bool) -> Json:
        message: Json = {"role": "assistant"} if is_first else {}
        if delta.call is not None and (delta.name or delta.text):
            part = called(delta.name, delta.text) if delta.name else {"function": {"arguments": delta.text}}
            message["tool_calls"] = [{"index": delta.call} | part]
        elif delta.finish is None:
            message["content"] = delta.text
        logprobs = {"content": [self._token(entry) for entry in delta.entries]} if delta.entries else None
        choice = {"index": delta.index, "delta": message, "logprobs": logprobs, "finish_reason": delta.finish}
        return choice | {"given": True} if delta.is_given else choice

    def _token(self, entry: LogprobEntry) -> Json:
        assert entry.logprobs is not None
        token = self._logprob(entry.token, entry.logprobs.logprob)
        token["top_logprobs"] = [self._logprob(*pair) for pair in entry.logprobs.top]
        return token | {"experts": entry.logprobs.experts} if self.has_experts else token

    def _logprob(self, token: int, logprob: float) -> Json:
        name, spelled = self.detokenizer.spell(token)
        return {"token": name, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(spelled)}


class TextFormatter(Formatter):
    """Of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, delta: Delta) -> Json:
        logprobs = self._logprobs(delta.entries) if self.has_logprobs else None
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def chunk_choice(self, delta: Delta, *, is_first: bool) -> Json:
        return self.choice(delta) if delta.entries else self.choice(delta) | {"logprobs": None}

    def _logprobs(self, entries: Sequence[LogprobEntry]) -> Json:
        def name(token: int) -> str:
            return self.detokenizer.spell(token)[0]

        def top(known: TokenLogprobs) -> dict[str, float]:
            return {name(token): max(logprob, MIN_LOGPROB) for token, logprob in known.top}

        known = [entry.logprobs for entry in entries]
        return {
            "tokens": [name(entry.token) for entry in entries],
            "token_logprobs": [each and max(each.logprob, MIN_LOGPROB) for each in known],
            "top_logprobs": [each and top(each) for each in known],
            "text_offset": [entry.offset for entry in entries],
        }


# --- JSON travels while it is written ---


class ClientGone(Exception):
    """The client has hung up."""


class EventStream(StreamingResponse):
    """The answer to a request with `stream`; `first` are the deltas that have come already."""

    media_type = "text/event-stream"

    def __init__(
        self, formatter: Formatter, generation: Generation, first: Sequence[Delta], *, has_usage: bool
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events(formatter, generation, first, has_usage=has_usage), headers=headers)
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # stops when the reader hangs up
        finally:
            self.generation.close()


async def events(
    formatter: Formatter, generation: Generation, deltas: Sequence[Delta], *, has_usage: bool
) -> AsyncIterator[bytes]:
    """One server-sent event for each chunk; those that are ready together travel together."""
    begun: set[int] = set()
    no_usage: Json = {"usage": None} if has_usage else {}
    try:
        while True:
            chunks: list[Json] = []
            for delta in deltas:
                chunks += formatter.chunks(delta, is_first=delta.index not in begun)
                begun.add(delta.index)
            yield b"".join(encode_event(chunk | no_usage) for chunk in chunks)
            if not generation.unfinished:
                break
            deltas = await generation.next_deltas()
        if has_usage:
            yield encode_event(formatter.message(formatter.chunk_kind, []) | {"usage": generation.usage})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield encode_event(error.body)
    except Exception:
        log.exception("a reply failed while it was streamed")
        yield encode_event(error_body(500, "the server failed while it was replying"))


def encode_event(message: Json) -> bytes:
    return b"data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def while_listening(work: Awaitable[T], receive: Receive) -> T:
    """The outcome of the work; ClientGone, and the work is cancelled, if the client hangs up before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
