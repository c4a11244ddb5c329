"""What do answers look like?

OpenAI's forms, once as models for the API's own description, and once as the dicts that are sent.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel

from nanollm.serve.choice import Entry, FinishReason, Part, Speller
from nanollm.serve.job import Job

Json = dict[str, Any]


class Usage(BaseModel):
    """Tokens of all prompts and all replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(BaseModel):
    """A token and its log-probability at temperature 1, before penalties, bias and filters."""

    token: str
    logprob: float
    bytes: list[int]


class LikelyToken(Likely):
    """A token of a reply; `experts` (one list for each MoE block) if the request asked for them."""

    top_logprobs: list[Likely]
    experts: list[list[int]] | None = None


class ChatLogprobs(BaseModel):
    content: list[LikelyToken]


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """Replies to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextAnswer(BaseModel):
    """Continuations of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model that is served, and the shape of it that a page may want to show."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    moe_blocks: list[int]
    n_routed_experts: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]


class Form(ABC):
    """How the replies of one request are written down; `kind` and `prefix` name the form."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, speller: Speller, *, has_logprobs: bool, has_experts: bool = False) -> None:
        self.model, self.speller = model, speller
        self.has_logprobs, self.has_experts = has_logprobs, has_experts
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def answer(self, job: Job, parts: Sequence[Part]) -> Json:
        """The whole answer."""
        return self._head(self.kind) | {"choices": [self.whole(part) for part in parts], "usage": usage(job)}

    def chunks(self, part: Part, *, is_first: bool) -> list[Json]:
        """Some of a choice, as one or two chunks of a stream: the reason why it ended comes by itself."""
        choices = []
        if part.text or part.entries or is_first:
            choices.append(self.delta(replace(part, finish=None), is_first=is_first))
        if part.finish is not None:
            choices.append(self.delta(Part(part.index, finish=part.finish), is_first=False))
        return [self._head(self.chunk_kind) | {"choices": [choice]} for choice in choices]

    def usage_chunk(self, job: Job) -> Json:
        return self._head(self.chunk_kind) | {"choices": [], "usage": usage(job)}

    @abstractmethod
    def whole(self, part: Part) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def delta(self, part: Part, *, is_first: bool) -> Json:
        """A choice of a chunk."""

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatForm(Form):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, part: Part) -> Json:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        logprobs = {"content": self._tokens(part.entries)} if self.has_logprobs else None
        return {"index": part.index, "message": message, "logprobs": logprobs, "finish_reason": part.finish}

    def delta(self, part: Part, *, is_first: bool) -> Json:
        delta = {"role": "assistant"} if is_first else {}
        if part.finish is None:
            delta["content"] = part.text
        logprobs = {"content": self._tokens(part.entries)} if part.entries else None
        return {"index": part.index, "delta": delta, "logprobs": logprobs, "finish_reason": part.finish}

    def _tokens(self, entries: Sequence[Entry]) -> list[Json]:
        return [self._token(entry) for entry in entries]

    def _token(self, entry: Entry) -> Json:
        token = self._likely(entry.token, entry.logprob)
        token["top_logprobs"] = [self._likely(*pair) for pair in entry.top]
        return token | {"experts": entry.scored.experts} if self.has_experts else token

    def _likely(self, token: int, logprob: float) -> Json:
        name, spelled = self.speller.spell(token)
        return {"token": name, "logprob": logprob, "bytes": list(spelled)}


class TextForm(Form):
    """Of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, part: Part) -> Json:
        logprobs = self._logprobs(part.entries) if self.has_logprobs else None
        return {"index": part.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def delta(self, part: Part, *, is_first: bool) -> Json:
        logprobs = self._logprobs(part.entries) if part.entries else None
        return {"index": part.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def _logprobs(self, entries: Sequence[Entry]) -> Json:
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._name(token): logprob for token, logprob in entry.top} for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _name(self, token: int) -> str:
        return self.speller.spell(token)[0]


def usage(job: Job) -> Json:
    """Usage as JSON."""
    asked, drawn = job.prompt_tokens, job.completion_tokens
    return {"prompt_tokens": asked, "completion_tokens": drawn, "total_tokens": asked + drawn}
