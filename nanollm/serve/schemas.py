"""What may a request say?

The part of OpenAI's API that this server has, strictly typed. Fields that it does not know are ignored, as clients send
many; fields that it knows and cannot honour are refused with what to use instead.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

MAX_BIASES = 300
ONLY_ZERO: dict[str, JsonValue] = {"minimum": 0, "maximum": 0}
Id = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _few(value: Any) -> Any:
    """Count before looking at each: a hundred thousand mistakes would take the time of everybody."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} tokens, got {len(value):,}")
    return value


Biases = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_few)]


class Body(BaseModel):
    """No coercion: "1" is not 1, and NaN is no number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream carries beside the reply."""

    include_usage: bool = Field(default=False, description="Send one more chunk, with `usage` and no choices.")


class Sampled(Body):
    """What chats and completions have in common."""

    model: str = Field(description="The name of the model, as /v1/models lists it.")
    stream: bool | None = Field(default=None, description="Send the reply as server-sent events while it is written.")
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, description="Replies to each prompt; reply i draws from seed + i.")
    seed: Seed | None = Field(default=None, description="Same seed, same reply; null: a random one.")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True)] | None = Field(
        default=None, description="Texts at which a reply ends; they are left out."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Divides the logits; 0: always the likeliest token. Default 1."
    )
    top_p: float | None = Field(
        default=None, ge=0, le=1, description="Choose among the likeliest tokens that reach this probability."
    )
    top_k: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Choose among the k likeliest tokens; 0: all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Choose among tokens at least this share as likely as the likeliest."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, description="Makes tokens already in the text less likely; 1: off."
    )
    logit_bias: Biases | None = Field(
        default=None, description="Token ids (as text) and what is added to their logits."
    )
    presence_penalty: float | None = Field(
        default=None, description="Not supported: only 0.", json_schema_extra=ONLY_ZERO
    )
    frequency_penalty: float | None = Field(
        default=None, description="Not supported: only 0.", json_schema_extra=ONLY_ZERO
    )

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


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
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


class ResponseFormat(Body):
    """The form of a reply: plain text, nothing else."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """A conversation to be replied to."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        fail_fast=True,
        description="Perhaps one of the system, then user and assistant in turn; the last is the user's.",
        examples=[[{"role": "user", "content": "What is 2 + 3?"}]],
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of a reply; null: as many as fit.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(default=None, description="Say how likely each token was.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Name the likeliest tokens at each place.")
    experts: bool | None = Field(
        default=None, description="With logprobs: say of each token which experts each MoE block chose to predict it."
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="Not supported.")

    @model_validator(mode="after")
    def _refuse_what_contradicts_itself(self) -> Self:
        for name in ("top_logprobs", "experts"):
            if getattr(self, name) and not self.logprobs:
                raise ValueError(f"{name} expects logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usual_tokens(self) -> int | None:
        """What is asked for when nothing is said; None: all that fit."""
        return None

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens the engine tells at each place; None: nothing of that kind."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Sampled):
    """Texts, or their ids, to be continued."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] = Field(
        description="A text, texts, ids, or lists of ids. Texts begin with the <s> token; ids are taken as they are.",
        examples=["Once upon a time"],
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of a completion. Default 16.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same as max_tokens.")
    logprobs: int | None = Field(default=None, ge=0, le=5, description="Name this many of the likeliest tokens.")
    echo: bool | None = Field(default=None, description="Not supported: only false.")
    best_of: int | None = Field(default=None, ge=1, description="Not supported: only n.")
    suffix: str | None = Field(default=None, description="Not supported: only null.")

    @model_validator(mode="after")
    def _refuse_what_nobody_continues(self) -> Self:
        if self.echo:
            raise ValueError("echo is not supported; put the prompt before the completion yourself")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported; ask for n completions and choose")
        if self.suffix:
            raise ValueError("suffix is not supported; the model only reads what comes before")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usual_tokens(self) -> int | None:
        return 16

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts one by one: texts, or ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return cast(Sequence[str | list[int]], [self.prompt] if is_one else self.prompt)
