"""How does a valid body become requests to the engine, within the server's limits?"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence

from nanollm.bundle import Bundle
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import LEAST_TEMPERATURE, SamplingConfig
from nanollm.serve.answers import Json
from nanollm.serve.choice import Choice, Speller
from nanollm.serve.errors import ApiError
from nanollm.serve.job import Job
from nanollm.serve.limits import MAX_MESSAGES, MAX_N, MAX_STOPS, MAX_TOKENS, Limits
from nanollm.serve.metrics import Metrics
from nanollm.serve.schemas import ChatMessage, ChatRequest, CompletionRequest
from nanollm.serve.worker import EngineStopped, QueueFull, Worker
from nanollm.text.chat import Conversation, Message, encode_prompt, reply_borders, reply_ends
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Asked = ChatRequest | CompletionRequest

RETRY_AFTER_S = 1
SEEDS = 2**63
LEAST_TOP_P = 1e-9  # what top_p 0 means: the likeliest token alone


class Service:
    """A bundle at work: what all routes share."""

    def __init__(self, bundle: Bundle, limits: Limits, name: str, make_engine: Callable[[], Engine]) -> None:
        self.config, self.tokenizer, self.limits, self.name = bundle.model.config, bundle.tokenizer, limits, name
        self.worker = Worker(make_engine, limits.capacity)
        self.metrics = Metrics(lambda: self.worker.figures)
        self.speller = Speller(bundle.tokenizer)
        self.created = int(time.time())
        self.most_prompt_tokens = self.config.context_length - 1
        self._longest_token_bytes = int(bundle.tokenizer.token_bytes.max())

    @property
    def card(self) -> Json:
        """The model's entry in /v1/models."""
        moe_blocks = [block + 1 for block in range(self.config.n_blocks) if self.config.is_moe(block)]
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanollm",
            "context_length": self.config.context_length,
            "moe_blocks": moe_blocks,
            "n_routed_experts": self.config.n_routed_experts,
        }

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"there is no model {name[:100]!r} here, only {self.name!r}", param="model", code="model_not_found"
            )

    async def chat(self, body: ChatRequest) -> Job:
        """Begin to reply to a conversation."""
        self._check(body)
        conversation = self._conversation(body.messages)
        characters = sum(len(message.content) for message in conversation.messages)
        ids = await self._encode(characters, "messages", lambda: encode_prompt(conversation, self.tokenizer))
        return self._begin(body, [ids], reply_borders(self.tokenizer))

    async def complete(self, body: CompletionRequest) -> Job:
        """Begin to continue texts."""
        self._check(body)
        n, prompts = body.n or 1, body.prompts
        if not 0 < len(prompts) * n <= self.limits.capacity:
            message = f"prompt: expected 1 to {self.limits.capacity // n or 1} prompts, got {len(prompts)}"
            raise ApiError(400, message, param="prompt")
        return self._begin(body, [await self._prompt(prompt) for prompt in prompts], reply_ends(self.tokenizer))

    # --- prompts ---

    def _conversation(self, messages: Sequence[ChatMessage]) -> Conversation:
        if len(messages) > MAX_MESSAGES:
            message = f"messages: expected at most {MAX_MESSAGES}, got {len(messages)}; drop the oldest"
            raise ApiError(400, message, param="messages")
        try:
            conversation = Conversation(
                tuple(Message("system" if m.role == "developer" else m.role, m.text) for m in messages)
            )
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        if conversation.messages[-1].role != "user":
            raise ApiError(400, "messages: the last one must be the user's, to be replied to", param="messages")
        return conversation

    async def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._encode(
                len(prompt), "prompt", lambda: [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
            )
        if not prompt:
            raise ApiError(400, "prompt: expected at least one id, got an empty list", param="prompt")
        self._checked_length(prompt, "prompt")
        if max(prompt) >= self.config.vocab_size:
            message = f"prompt: ids must be below {self.config.vocab_size:,}, got {str(max(prompt))[:30]}"
            raise ApiError(400, message, param="prompt")
        return prompt

    async def _encode(self, characters: int, param: str, encode: Callable[[], list[int]]) -> list[int]:
        """The ids of a text, unless it is so long that they cannot fit: nobody should wait for that to be found out."""
        if characters > self.most_prompt_tokens * self._longest_token_bytes:
            raise self._too_long(f"more than {characters // self._longest_token_bytes:,}", param)
        return self._checked_length(await asyncio.to_thread(encode), param)

    def _checked_length(self, ids: list[int], param: str) -> list[int]:
        if len(ids) > self.most_prompt_tokens:
            raise self._too_long(f"{len(ids):,}", param)
        return ids

    def _too_long(self, tokens: str, param: str) -> ApiError:
        return ApiError(
            400,
            f"{param}: the prompt has {tokens} tokens, at most {self.most_prompt_tokens:,} are accepted (the model's "
            f"context is {self.config.context_length:,} with the reply); shorten it",
            param=param,
            code="context_length_exceeded",
        )

    # --- requests ---

    def _begin(self, body: Asked, prompts: Sequence[list[int]], end_ids: frozenset[int]) -> Job:
        """Hand the requests of all replies to the engine: those to one prompt beside each other."""
        n, seed = body.n or 1, secrets.randbits(62) if body.seed is None else body.seed
        most_tokens, sampling = self._most_tokens(body), self._sampling(body)
        requests = [
            Request(
                prompt=prompt,
                max_tokens=most_tokens,
                sampling=sampling,
                end_ids=end_ids,
                stop=stop_function(self.tokenizer, body.stops),
                seed=(seed + number) % SEEDS,
                top_logprobs=body.likeliest,
            )
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(n))
        ]
        try:
            replies = self.worker.submit(requests)
        except QueueFull as error:
            raise ApiError(429, str(error), headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        except EngineStopped as error:
            raise ApiError(503, str(error)) from error
        choices = [Choice(index, self.speller, body.stops) for index in range(len(requests))]
        return Job(self.worker, self.metrics, replies, choices, self.limits.deadline_s)

    def _check(self, body: Asked) -> None:
        """Refuse what no prompt could make right, before one is encoded."""
        self.check_name(body.model)
        limits = self.limits
        for name, count, most in (
            ("n", body.n or 1, min(MAX_N, limits.capacity)),
            ("stop", len(body.stops), MAX_STOPS),
            ("max_tokens", body.most_tokens or 1, MAX_TOKENS),
        ):
            if count > most:
                raise ApiError(400, f"{name}: expected at most {most:,}, got {str(count)[:30]}", param=name)

    def _most_tokens(self, body: Asked) -> int:
        usual = body.usual_tokens or self.config.context_length
        return body.most_tokens or min(MAX_TOKENS, usual)

    def _sampling(self, body: Asked) -> SamplingConfig:
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        return SamplingConfig(
            temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            top_k=body.top_k or 0,
            top_p=max(top_p, LEAST_TOP_P),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            logit_bias=self._bias(body.logit_bias or {}),
        )

    def _bias(self, bias: dict[str, float]) -> dict[int, float]:
        for key in bias:
            if not (key.isascii() and key.isdigit() and len(key) < 9 and int(key) < self.config.vocab_size):
                message = f"logit_bias: expected ids from 0 to {self.config.vocab_size - 1:,} as text, got {key[:30]!r}"
                raise ApiError(400, message, param="logit_bias")
        return {int(key): value for key, value in bias.items()}


def stop_function(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[int], bool] | None:
    """What the engine asks, in its own thread, whether a reply is over; it has a text of its own to look at."""
    if not stops:
        return None
    text = TextStream(tokenizer, stops)

    def is_over(token: int) -> bool:
        try:
            text.push(token)
        except Exception:  # would end everybody's replies; the reply's own text will meet it again, and end only this
            log.exception("the text of a reply could not be followed; it ends here")
            return True
        return text.is_stopped

    return is_over
