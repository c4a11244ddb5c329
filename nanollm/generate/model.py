"""A bundle in two lines of Python: `model = nanollm.load(folder)`, `model.chat("How far are the rocks?")`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nanollm.bundle import Bundle, load_bundle
from nanollm.config import check_at_least
from nanollm.generate.constraints import TEXT, Compiler, Constraint, json_rule, reply_grammar
from nanollm.generate.engine import Engine, check_finish, generate
from nanollm.generate.request import Completion, Quantize, Request
from nanollm.generate.sampling import SamplingConfig
from nanollm.generate.tools import tool_caller, with_tools
from nanollm.text.chat import (
    Calls,
    Conversation,
    Message,
    ToolChoice,
    encode_prompt,
    function_text,
    reply_borders,
    reply_ends,
)
from nanollm.text.stream import TextStream, check_stops
from nanollm.text.tokenizer import CALL, Tokenizer
from nanollm.world import DeviceName, DtypeName, World

Schema = Mapping[str, Any]
"""A JSON schema."""
NO_CALLS = Calls()
Messages = Sequence[Mapping[str, Any]]
"""A conversation as the server takes it: [{"role": "user", "content": "..."}, ...]."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """How texts are continued, and replies are written."""

    max_tokens: int = 128
    """Maximum length of what is written, in tokens."""
    seed: int = 0
    """Text i draws from seed + i."""
    stop: list[str] = field(default_factory=list)
    """Texts at which it ends; they are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stops(self.stop)
        check_at_least(1, self, "max_tokens")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be from 0 to 2**62 - 1, got {self.seed}")


class LanguageModel:
    """Continues texts and replies to messages. Equal settings, those of GenerateConfig, give the bits of every verb and
    of the server. With a schema, a reply is JSON that follows it, unless max_tokens cuts it, and no tool writes."""

    def __init__(self, bundle: Bundle, quantize: Quantize = "none") -> None:
        self.bundle, self.quantize = bundle, quantize

    def generate(self, prompts: str | Sequence[str], *, schema: Schema | None = None, **settings: Any) -> Any:
        """What follows a text: str; of a list of texts, which are continued in one batch, a list."""
        asked = [prompts] if (is_one := isinstance(prompts, str)) else prompts
        texts = [text for text, _ in self.complete(asked, GenerateConfig(**settings), schema, is_chat=False)]
        return texts[0] if is_one else texts

    def chat(
        self,
        messages: str | Messages | Sequence[str | Messages],
        *,
        schema: Schema | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = None,
        parallel_tool_calls: bool = True,
        **settings: Any,
    ) -> Any:
        """The reply to a question or to messages: str; to a list of these, in one batch, a list.

        With tools, functions in OpenAI's form, a reply is a message in that form, with its `tool_calls`. It and then
        {"role": "tool", "content": ...}, what each function returned, in the order of the calls, are the next messages.
        """
        is_one = isinstance(messages, str) or isinstance(messages[0], Mapping)
        asked: Any = [messages] if is_one else messages
        c = GenerateConfig(**settings)
        told = [*map(function_text, tools)]
        calls = Calls.of(tools, tool_choice, is_parallel=parallel_tool_calls)
        replies = [
            message_of(each.ids, self.tokenizer, c.stop, has_calls=bool(calls.functions)) if tools else text
            for text, each in self.complete(asked, c, schema, is_chat=True, calls=calls, told=told)
        ]
        return replies[0] if is_one else replies

    def stream(
        self, asked: str | Messages, *, schema: Schema | None = None, is_chat: bool = True, **settings: Any
    ) -> Iterator[str]:
        """The same reply, or with is_chat=False the same continuation, piece by piece; never half a character."""
        c = GenerateConfig(**settings)
        text, engine = TextStream(self.tokenizer, c.stop), Engine(self.bundle.model, rows=1, quantize=self.quantize)
        pieces = list[str]()

        def is_over(token: int) -> bool:
            pieces.append(text.push(token))
            return text.is_stopped

        constraint = self._constraint(schema)
        make_tool = tool_caller(self.bundle) if constraint is None else None
        completion = engine.submit(
            Request(
                prompt=self._encode(asked, is_chat),
                max_tokens=c.max_tokens,
                sampling=c,
                stop_token_ids=self._ends(is_chat),
                stop=is_over,
                tool=None if make_tool is None else make_tool(),
                constraint=constraint,
                seed=c.seed,
            )
        )
        while engine.has_work:
            engine.step()
            yield from filter(None, pieces)
            pieces.clear()
        check_finish(completion)
        yield text.close()

    def logprobs(self, text: str) -> list[tuple[str, float]]:
        """Each token of a document that begins with this text, and its log-probability in nats behind those before."""
        ids, model = [self.tokenizer.bos_id, *self.tokenizer.encode(text)], self.bundle.model
        if len(ids) > (limit := model.config.context_length):
            raise ValueError(f"the text has {len(ids):,} tokens with <s>, the model's context is {limit:,}; shorten it")
        with torch.inference_mode(), model.evaluating():
            logits = model(torch.tensor([ids], device=model.head.weight.device))[0, :-1]  # (T, V)
        likely = logits.float().log_softmax(-1).cpu()[range(len(ids) - 1), ids[1:]].tolist()
        return [(self.tokenizer.pieces[token].text, each) for token, each in zip(ids[1:], likely, strict=True)]

    def complete(
        self,
        asked: Sequence[str | Messages],
        c: GenerateConfig,
        schema: Schema | None = None,
        *,
        is_chat: bool,
        calls: Calls = NO_CALLS,
        told: Sequence[str] = (),
    ) -> list[tuple[str, Completion]]:
        """Text and completion of each, in one batch. told: of functions, where some may be called."""
        constraint = self._constraint(schema, calls)
        completions = generate(
            self.bundle.model,
            [self._encode(each, is_chat, told if calls.functions else ()) for each in asked],
            c,
            max_tokens=c.max_tokens,
            stop_token_ids=self._ends(is_chat),
            seed=c.seed,
            stop=(lambda: TextStream(self.tokenizer, c.stop).stops_at) if c.stop else None,
            tool=tool_caller(self.bundle) if constraint is None else None,
            constraint=None if constraint is None else constraint.copy,
            quantize=self.quantize,
        )
        return [(TextStream(self.tokenizer, c.stop).read(each.ids), each) for each in completions]

    @cached_property
    def _compiler(self) -> Compiler:
        return Compiler(self.tokenizer)

    def _constraint(self, schema: Schema | None, calls: Calls = NO_CALLS) -> Constraint | None:
        if schema is None and not calls.functions:
            return None
        rule = TEXT if schema is None else json_rule(schema)
        try:
            return self._compiler.compile(reply_grammar(rule, self.tokenizer, calls))
        except ValueError as error:
            raise ValueError(f"{'schema' if schema is not None else 'tools'}: {error}") from None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.bundle.tokenizer

    def _ends(self, is_chat: bool) -> frozenset[int]:
        return reply_borders(self.tokenizer) if is_chat else reply_ends(self.tokenizer)

    def _encode(self, asked: str | Messages, is_chat: bool, functions: Sequence[str] = ()) -> list[int]:
        if is_chat:
            given = [Message("user", asked)] if isinstance(asked, str) else [Message.of(each) for each in asked]
            return encode_prompt(Conversation(tuple(given), tuple(functions)), self.tokenizer)
        if not isinstance(asked, str):
            raise TypeError(f"only a text can be continued, got {asked!r:.80}; messages are for chat")
        return [self.tokenizer.bos_id, *self.tokenizer.encode(asked)]


def load(
    folder: str | Path,
    *,
    tools: Sequence[str] | None = None,
    quantize: Quantize = "none",
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> LanguageModel:
    """The model of a bundle; options as those of `nanollm generate`."""
    world = World.start(device, dtype)
    return LanguageModel(with_tools(load_bundle(Path(folder), world.dtype, world.device), tools), quantize)


def message_of(ids: Sequence[int], tokenizer: Tokenizer, stops: Sequence[str], *, has_calls: bool) -> dict[str, Any]:
    """The same text as a message in OpenAI's form, with its calls; the last may be cut in its arguments."""
    text = (stream := TextStream(tokenizer, stops)).read(ids)
    call_id = tokenizer.mark_id(CALL) if has_calls else None
    marks = [begin for token, begin in zip(ids, stream.begins, strict=False) if token == call_id]
    content, *calls = [text[begin:end] for begin, end in pairwise([0, *marks, len(text)])]
    made = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, space, arguments in (call.partition(" ") for call in calls)
        if space
    ]
    return {"role": "assistant", "content": content or (None if made else ""), "tool_calls": made}
