"""OpenAI's protocol: what clients send, what they get, and the one form of every error.

Requests are strictly typed. Fields that this server does not know are ignored, as clients send many; fields that it
knows and cannot honour are refused with what to use instead.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from starlette.exceptions import HTTPException

Json = dict[str, Any]
FinishReason = Literal["stop", "length"]

# --- errors ---

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ERROR_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden_host",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    499: "client_closed_request",
    500: "internal_error",
    503: "engine_stopped",
    504: "deadline_exceeded",
}
MAX_ECHO = 100
"""Characters of what a client sent that an answer repeats: enough to find it, however long it is."""


class ErrorDetail(BaseModel):
    """What was expected, what came, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than 200, raised wherever that becomes clear."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = error_body(status, message, param, code)

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    """The JSON of an error."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or ERROR_CODES.get(status)}}


def explain(faults: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """One line about the first field of a body that does not fit its schema, and the field's place in the body.

    Where several types are allowed, there is a fault for each: the one that got furthest says what was meant.
    """
    same_field = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    fault = max(same_field, key=lambda fault: (len(_place(fault, body)), not fault["type"].endswith("_type")))
    param = ".".join(map(str, _place(fault, body)))[:MAX_ECHO] or None
    message = f"{param or 'body'}: {fault['msg']}".replace("Value error, ", "")
    if fault["type"] not in ("missing", "value_error"):
        message += f", got {repr(fault.get('input'))[:MAX_ECHO]}"
    return message, param


def _place(fault: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices down to a fault; the names of types, which stand among them, are left out."""
    place: list[str | int] = []
    for step in fault["loc"][1:]:
        if (isinstance(body, dict) and step in body) or (isinstance(body, list) and isinstance(step, int)):
            place.append(step)
            body = body[step]
        elif fault["type"] == "missing":
            place.append(step)
    return place


# --- requests ---

MAX_BIASES = 300
ONLY_ZERO: dict[str, JsonValue] = {"minimum": 0, "maximum": 0}
Id = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _count_first(value: Any) -> Any:
    """Count before looking at each: a hundred thousand mistakes would take the time of everybody."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} tokens, got {len(value):,}")
    return value


Biases = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_count_first)]


class StrictModel(BaseModel):
    """No coercion: "1" is not 1, and NaN is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """What a stream carries beside the reply."""

    include_usage: bool = Field(False, description="Send one more chunk, with `usage` and no choices.")


class SamplingRequest(StrictModel):
    """The fields that chats and completions share."""

    model: str = Field(description="The name of the model, as /v1/models lists it.")
    stream: bool | None = Field(None, description="Send the reply as server-sent events while it is written.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, description="Replies to each prompt; reply i draws from seed + i.")
    seed: Seed | None = Field(None, description="Same seed, same reply; null: a random one.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True)] | None = Field(
        None, description="Texts at which a reply ends; left out."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="Divides the logits; 0: greedy. Default 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Choose among the likeliest that reach this probability.")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Choose among the k likeliest; 0: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, as a share of the likeliest's.")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="Above 1: repeat less.")
    logit_bias: Biases | None = Field(None, description="Token ids (as text): what to add to their logits.")
    presence_penalty: float | None = Field(None, description="Not supported: only 0.", json_schema_extra=ONLY_ZERO)
    frequency_penalty: float | None = Field(None, description="Not supported: only 0.", json_schema_extra=ONLY_ZERO)

    @model_validator(mode="after")
    def _refuse_what_is_not_supported(self) -> Self:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported, got {getattr(self, name)}; use repetition_penalty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options expects stream to be true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(StrictModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is another word for system."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        description="Text, or text parts that are joined."
    )

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(StrictModel):
    """The form of a reply: plain text, nothing else."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """A conversation to be replied to."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        fail_fast=True,
        description="Perhaps one of the system, then user and assistant in turn; the last is the user's.",
        examples=[[{"role": "user", "content": "What is 2 + 3?"}]],
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of a reply; null: as many as fit.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Say how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Name the likeliest tokens at each place.")
    experts: bool | None = Field(None, description="With logprobs: the experts of each token.")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _refuse_what_contradicts_itself(self) -> Self:
        for name in ("top_logprobs", "experts"):
            if getattr(self, name) and not self.logprobs:
                raise ValueError(f"{name} expects logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def default_max_tokens(self) -> int | None:
        """What is asked for when nothing is said; None: all that fit."""
        return None

    @property
    def engine_top_logprobs(self) -> int | None:
        """How many of the likeliest tokens the engine tells at each place; None: nothing of that kind."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """Texts, or their ids, to be continued."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] = Field(
        description="A text, texts, ids, or lists of ids. Texts begin with <s>; ids are taken as they are.",
        examples=["Once upon a time"],
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of a completion. Default 16.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    logprobs: int | None = Field(None, ge=0, le=5, description="Name this many of the likeliest tokens.")
    echo: bool | None = Field(None, description="Not supported: only false.")
    best_of: int | None = Field(None, ge=1, description="Not supported: only n.")
    suffix: str | None = Field(None, description="Not supported: only null.")

    @model_validator(mode="after")
    def _refuse_what_is_not_supported_here(self) -> Self:
        if self.echo:
            raise ValueError("echo is not supported; put the prompt before the completion yourself")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported; ask for n completions and choose")
        if self.suffix:
            raise ValueError("suffix is not supported; the model only reads what comes before")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def default_max_tokens(self) -> int | None:
        return 16

    @property
    def engine_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts one by one: texts, or ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return cast(Sequence[str | list[int]], [self.prompt] if is_one else self.prompt)


# --- answers ---


class Usage(BaseModel):
    """Tokens of all prompts and all replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token and its log-probability at temperature 1, before penalties, bias and filters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a reply; `experts` (one list for each MoE block) if the request asked for them."""

    top_logprobs: list[TopLogprob]
    experts: list[list[int]] | None = None


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
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


class TextCompletion(BaseModel):
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
