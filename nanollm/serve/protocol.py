"""OpenAI's protocol: the bodies that clients send, and the one form of every error.

Requests are strictly typed. Fields that this server does not know are ignored, as clients send many; those that would
change a reply and are not supported are refused.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from nanollm.generate.constraints import OBJECT, choice_rule, json_rule, regex_rule
from nanollm.text.chat import NAME, Calls

Json = dict[str, Any]
FinishReason = Literal["stop", "length", "tool_calls"]

# --- errors ---

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ERROR_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden_host",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    429: "queue_full",
    499: "client_closed_request",
    500: "internal_error",
    503: "engine_stopped",
    504: "deadline_exceeded",
}
MAX_ECHO = 100  # characters of what a client sent that an answer repeats: enough to find it, however long it is


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


def fault_of(error: UnicodeDecodeError) -> str:
    """Why a body is no text: JSON may be UTF-8 or UTF-16, with a byte order mark or without."""
    if error.object.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; send it as it is"
    return f"it is not {error.encoding.upper()} (byte 0x{error.object[error.start]:02x} at place {error.start})"


def explain(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """One line about the first field of a body that does not fit its schema, and where that field is.

    Where several types are allowed there is an error for each: the one that got furthest says what was meant.
    """
    if isinstance(body, bytes):
        return "expected JSON with the header Content-Type: application/json", None
    if errors[0]["type"] == "json_invalid":
        reason = errors[0]["ctx"]["error"].removesuffix(" at")
        return f"the body is not valid JSON: {reason}, at character {errors[0]['loc'][1]}", None
    same_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(same_field, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    # A location has the names of types in it, too: ("body", "messages", 0, "content", "list[TextPart]").
    place = [*error["loc"][1:2], *(step for step in error["loc"][2:] if isinstance(step, int))]
    if error["type"] in ("missing", "extra_forbidden") and len(error["loc"]) > 2:
        place.append(error["loc"][-1])
    param = ".".join(map(str, place)) or None
    message = f"{param or 'body'}: {error['msg']}".replace("Value error, ", "")
    if error["type"] not in ("missing", "extra_forbidden", "value_error"):
        message += f", got {repr(error.get('input'))[:MAX_ECHO]}"
    return message, param


# --- requests ---

UNSUPPORTED = {
    "presence_penalty": "use repetition_penalty",
    "frequency_penalty": "use repetition_penalty",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "echo": "use /v1/completions",
    "suffix": "the model only reads what comes before",
    "best_of": "ask for n completions and choose",
    "modalities": "the model writes text alone",
    "audio": "the model writes text alone",
    "prediction": "replies are written from their beginning",
    "guided_grammar": "use guided_json, guided_regex or guided_choice",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "min_tokens": "a reply ends where the model ends it",
    "ignore_eos": "a reply ends where the model ends it",
    "stop_token_ids": "use stop",
    "bad_words": "use logit_bias",
    "continue_final_message": "use /v1/completions",
    "chat_template": "the model has its own",
}
WITHOUT_EFFECT = {"function_call": ("none", "auto"), "modalities": (["text"],)}


def whole(number: Any) -> Any:
    """40 for 40.0, as some clients write it."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = Annotated[int, BeforeValidator(whole)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
IdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MaxTokens = Annotated[Whole, Field(ge=-1, lt=2**63)]
NO_LIMIT = 2**31  # tokens: a reply ends where the context ends


class StrictModel(BaseModel):
    """No coercion: "1" is not 1, and NaN is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """What a stream carries beside the reply."""

    include_usage: bool = Field(False, description="Send one more chunk, with `usage` and no choices.")


def parsed(schema: Any) -> Any:
    """A JSON schema that may be written as a text."""
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


Schema = Annotated[Json, BeforeValidator(parsed)]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=10_000)]


class JsonSchema(StrictModel):
    """A schema with a name, which nobody reads."""

    name: str | None = None
    written: Json = Field(alias="schema")


class ResponseFormat(StrictModel):
    """The form of a reply, as OpenAI names it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _refuse_a_form_without_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        return self


class StructuredOutputs(StrictModel):
    """The same and more, as vLLM names it."""

    model_config = ConfigDict(extra="forbid")

    written: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None


class KnownFields(StrictModel):
    """Refuses what is not supported by its name."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        for name, advice in UNSUPPORTED.items():
            if name in cls.model_fields:
                continue
            if isinstance(body, dict) and body.get(name) and body[name] not in WITHOUT_EFFECT.get(name, ()):
                raise ValueError(f"{name} is not supported; {advice}")
        return body


class SamplingRequest(KnownFields):
    """The fields that chats and completions share."""

    default_max_tokens: ClassVar[int]

    model: str = Field(description="The name of the model, as /v1/models lists it.")
    max_tokens: MaxTokens | None = Field(None, description="Maximum length of a reply in tokens; -1: as many as fit.")
    max_completion_tokens: MaxTokens | None = Field(None, description="The newer name of max_tokens.")
    stream: bool | None = Field(None, description="Send the reply as server-sent events while it is written.")
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(None, ge=1, le=8, description="Replies to each prompt; reply i draws from seed + i.")
    seed: Seed | None = Field(None, description="Same seed, same reply; null or -1: a random one.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="Texts at which a reply ends; left out."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="Divides the logits; 0: greedy. Default 1.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Choose among the most likely that reach this probability."
    )
    top_k: Whole | None = Field(None, ge=-1, lt=2**31, description="Choose among the k most likely; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability, as a share of the highest.")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="Above 1: repeat less.")
    logit_bias: Annotated[dict[IdText, Bias], Field(max_length=300)] | None = Field(
        None, description="Token ids (as text): what to add to their logits."
    )
    response_format: ResponseFormat | None = Field(None, description="Text, any JSON object, or JSON by a schema.")
    guided_json: Schema | None = Field(None, description="A JSON schema that the reply follows.")
    guided_regex: str | None = Field(None, description="A regular expression that matches the whole reply.")
    guided_choice: Choices | None = Field(None, description="Texts, of which the reply is one.")
    structured_outputs: StructuredOutputs | None = Field(None, description="json, regex, choice or json_object.")

    @model_validator(mode="after")
    def _refuse_options_without_effect(self) -> Self:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not getattr(self, "echo", None):
                raise ValueError(f"{name} expects at least 1 token, or -1 for as many as fit, got 0")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options expects stream to be true")
        if len(given := [field for field, _ in self.forms]) > 1:
            raise ValueError(f"{given[1]} and {given[0]} both say what the reply must look like; send one")
        return self

    @property
    def calls(self) -> Calls:
        """What a reply may call: nothing but in a chat."""
        return Calls()

    @property
    def forms(self) -> list[tuple[str, Callable[[], str]]]:
        """Each field that says what the reply must look like, and what makes a grammar's rule of it."""
        wanted = self.response_format or ResponseFormat(type="text")
        more = self.structured_outputs or StructuredOutputs.model_validate({})
        known: list[tuple[str, Callable[[Any], str], Any]] = [
            ("response_format", json_rule, OBJECT if wanted.type == "json_object" else None),
            ("response_format", json_rule, wanted.json_schema and wanted.json_schema.written),
            ("guided_json", json_rule, self.guided_json),
            ("guided_regex", regex_rule, self.guided_regex),
            ("guided_choice", choice_rule, self.guided_choice),
            ("structured_outputs.json_object", json_rule, OBJECT if more.json_object else None),
            ("structured_outputs.json", json_rule, more.written),
            ("structured_outputs.regex", regex_rule, more.regex),
            ("structured_outputs.choice", choice_rule, more.choice),
        ]
        return [(field, partial(rule, value)) for field, rule, value in known if value is not None]

    @property
    def token_limit(self) -> int:
        given = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        limit = given[0] if given else self.default_max_tokens
        return NO_LIMIT if limit < 0 else min(limit, NO_LIMIT)

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

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, part: Any) -> Any:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise ValueError(f"{str(kind)[:MAX_ECHO].removesuffix('_url')} parts are not supported, only text")
        return part


class CalledFunction(StrictModel):
    """What a call calls, with its arguments as JSON."""

    name: str
    arguments: str


class Call(StrictModel):
    """A call of a function by the assistant."""

    id: str
    function: CalledFunction


class ChatMessage(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is another word for system."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description="Text, or text parts that are joined; null only beside tool_calls."
    )
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=128)] | None = Field(
        None, description="Of the assistant: the functions that it called."
    )
    tool_call_id: str | None = Field(None, description="Of a tool: the call that this is the answer to.")

    @model_validator(mode="after")
    def _refuse_halves(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("the role tool and the field tool_call_id go together")
        return self

    @property
    def openai(self) -> Json:
        """Content as one text, and a role of ours."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        calls = [call.model_dump() for call in self.tool_calls or ()]
        return {"role": "system" if self.role == "developer" else self.role, "content": text, "tool_calls": calls}


class Function(StrictModel):
    """A function that the model may call."""

    name: str = Field(pattern=f"^{NAME.pattern}$")
    description: str | None = None
    parameters: Json | None = Field(None, description="A JSON schema of its arguments, which are an object.")
    strict: bool | None = Field(None, description="Follow every keyword of the schema, or refuse it.")


class FunctionTool(StrictModel):
    """A tool of the only kind that there is here."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """Which function to call."""

    name: str


class NamedTool(StrictModel):
    """Which tool to call."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingRequest):
    """A conversation to be replied to, by default with as many tokens as fit."""

    default_max_tokens: ClassVar[int] = NO_LIMIT

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=1000,
        fail_fast=True,
        description="Perhaps one of the system, then user and assistant in turn, with the answers of tools to each "
        "call; the last is the user's or a tool's.",
        examples=[[{"role": "user", "content": "What is 2 + 3?"}]],
    )
    logprobs: bool | None = Field(None, description="Say how likely each token was.")
    top_logprobs: Whole | None = Field(None, ge=0, le=20, description="Name the most likely tokens at each place.")
    experts: bool | None = Field(None, description="With logprobs: the experts of each token.")
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=128)] | None = Field(
        None, description="Functions that the model may call; the client runs them."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether it calls some, or which one. Default auto, where there are tools."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may come at once. Default true.")

    @model_validator(mode="after")
    def _refuse_details_without_logprobs(self) -> Self:
        for name in ("top_logprobs", "experts"):
            if getattr(self, name) and not self.logprobs:
                raise ValueError(f"{name} expects logprobs to be true")
        return self

    @model_validator(mode="after")
    def _refuse_tools_that_are_not_there(self) -> Self:
        _ = self.calls  # which checks them
        return self

    @property
    def calls(self) -> Calls:
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        tools = [tool.model_dump() for tool in self.tools or ()]
        return Calls.of(tools, choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def engine_top_logprobs(self) -> int | None:
        """How many of the most likely tokens the engine tells at each place; None: nothing of that kind."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """Texts, or their ids, to be continued, by default by 16 tokens."""

    default_max_tokens: ClassVar[int] = 16

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, min_length=1)] = Field(
        description="A text, texts, ids, or lists of ids. Texts begin with <s>; ids are taken as they are.",
        examples=["Once upon a time"],
    )
    logprobs: Whole | None = Field(None, ge=0, le=5, description="Name this many of the most likely tokens.")
    echo: bool | None = Field(None, description="Begin with the prompt, scored if logprobs are; max_tokens may be 0.")

    @property
    def engine_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts one by one: texts, or ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(Sequence[str | list[int]], [self.prompt] if is_one else self.prompt)


class TokenizeRequest(KnownFields):
    """A text or a conversation whose ids are asked for, in vLLM's form."""

    model: str | None = Field(None, description="Any of the names in /v1/models: they share a tokenizer.")
    prompt: str | None = Field(None, examples=["Once upon a time"])
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=1000, fail_fast=True)
    add_special_tokens: bool = Field(True, description="Begin a prompt with <s>.")
    add_generation_prompt: Literal[True] = Field(True, description="The ids of messages end where the reply begins.")
    tools: list[FunctionTool] | None = Field(None, description="As in a chat: the functions that messages may call.")
    return_token_strs: bool | None = Field(None, description="Name the pieces, too.")

    @model_validator(mode="after")
    def _refuse_both_and_neither(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(StrictModel):
    """Ids whose text is asked for, in vLLM's form."""

    model: str | None = Field(None, description="As in /tokenize.")
    tokens: list[Id] = Field(fail_fast=True, examples=[[2, 300]])
