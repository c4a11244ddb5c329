"""The server as an ASGI app: what every path answers, and how a valid body becomes requests to the engine."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from nanollm import __version__
from nanollm.bundle import Bundle
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import LEAST_TEMPERATURE, SamplingConfig
from nanollm.serve import protocol
from nanollm.serve.engine_thread import EngineStopped, EngineThread, QueueFull
from nanollm.serve.metrics import Meter, Metrics
from nanollm.serve.protocol import ApiError, ChatRequest, CompletionRequest, ErrorBody, Json, error_body, explain
from nanollm.serve.server import Cors, Guard
from nanollm.serve.streaming import (
    ChatFormatter,
    Choice,
    ClientGone,
    Detokenizer,
    EventStream,
    Formatter,
    Generation,
    TextFormatter,
    while_listening,
)
from nanollm.text.chat import Conversation, Message, encode_prompt, reply_borders, reply_ends
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Tokens of a reply that a request may ask for, whatever fits into the model's context."""
MAX_N = 8
MAX_STOPS = 4
MAX_MESSAGES = 1000
MIN_TOP_P = 1e-9  # what top_p 0 means: the most likely token alone
RETRY_AFTER_S = 1
SEEDS = 2**63

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


def build_app(
    bundle: Bundle,
    make_engine: Callable[[], Engine],
    *,
    model_name: str,
    api_key: str,
    capacity: int,
    max_body_bytes: int,
    deadline_s: float,
    cors_origins: Sequence[str],
) -> FastAPI:
    """The server of a bundle; its engine starts and ends with it.

    api_key: empty if none is asked for; capacity: how many replies are taken on at once, running and waiting.
    """
    service = Service(bundle, EngineThread(make_engine, capacity), model_name, deadline_s)
    app = FastAPI(
        title="NanoLLM",
        version=__version__,
        description="A small language model behind the forms of OpenAI's API.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(service.engine),
    )
    app.state.service = service
    app.include_router(build_health(service))
    described = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # Guard does the checking
    app.include_router(build_api(service), dependencies=described)
    app.include_router(build_page())
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    if cors_origins:
        app.add_middleware(
            Cors, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    app.add_middleware(Meter, metrics=service.metrics)
    return app


def _lifespan(engine: EngineThread) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    return live


async def _answer_error(request: HttpRequest, error: Exception) -> JSONResponse:
    """Any error with a status, ours or the framework's."""
    if isinstance(error, ApiError):
        return error.response
    assert isinstance(error, HTTPException)
    message = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
    detail = message.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, detail), error.status_code, error.headers)


async def _answer_invalid(request: HttpRequest, error: Exception) -> JSONResponse:
    """A body that does not fit its schema: where, what was expected, what came."""
    assert isinstance(error, RequestValidationError)
    message, param = explain(error.errors(), error.body)
    return JSONResponse(error_body(400, message, param=param), 400)


# --- routes ---


class StrictRequest(HttpRequest):
    """A request whose body is JSON in UTF-8, without NaN and not nested out of reason."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class StrictRoute(APIRoute):
    """A route that takes application/json and nothing else, so that no form of another page can post to it."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: HttpRequest) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, f"expected the content-type application/json, got {kind[:100] or 'none'}")
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_json


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_api(service: "Service") -> APIRouter:
    """The routes that clients call."""
    router = APIRouter(route_class=StrictRoute, responses=ERRORS)

    @router.get("/v1/models", response_model=protocol.ModelList)
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [service.card]})

    @router.get("/v1/models/{model}", response_model=protocol.ModelCard)
    async def model(model: str) -> Response:
        """What there is to know of a model."""
        service.check_name(model)
        return JSONResponse(service.card)

    @router.post("/v1/chat/completions", response_model=protocol.ChatCompletion, responses=STREAMED)
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Reply to a conversation."""
        generation = await service.chat(body)
        formatter = ChatFormatter(
            service.name, service.detokenizer, has_logprobs=bool(body.logprobs), has_experts=bool(body.experts)
        )
        return await answer(body, generation, formatter, request)

    @router.post("/v1/completions", response_model=protocol.TextCompletion, responses=STREAMED)
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue texts."""
        generation = await service.complete(body)
        formatter = TextFormatter(service.name, service.detokenizer, has_logprobs=body.logprobs is not None)
        return await answer(body, generation, formatter, request)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def build_health(service: "Service") -> APIRouter:
    """The one route that needs no key."""
    router = APIRouter(responses=ERRORS)

    @router.get("/health", response_model=protocol.Health)
    async def health() -> Response:
        """Whether the server can reply."""
        if not service.engine.is_alive:
            raise ApiError(503, "the engine has stopped; start the server again")
        return JSONResponse({"status": "ok"})

    return router


def build_page() -> APIRouter:
    """The chat page: files read once, so that no path reaches the file system."""
    router = APIRouter(include_in_schema=False)
    files = {
        file.name: (file.read_bytes(), {"Content-Type": MEDIA_TYPES[file.suffix], "Cache-Control": "no-cache"})
        for file in PAGE.iterdir()
        if file.suffix in MEDIA_TYPES
    }

    @router.get("/")
    async def index() -> Response:
        return await file("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:100]!r}")
        content, headers = files[name]
        return Response(content, headers=headers)

    return router


async def answer(
    body: ChatRequest | CompletionRequest, generation: Generation, formatter: Formatter, request: HttpRequest
) -> Response:
    """The replies at once, or a stream of them; whatever fails before the first token is an answer of its own."""
    is_handed_over = False
    try:
        if not body.stream:
            whole = await while_listening(generation.collect(), request.receive)
            return JSONResponse(formatter.whole(generation, whole))
        first = await while_listening(generation.next_deltas(), request.receive)
        is_handed_over = True
        return EventStream(formatter, generation, first, has_usage=body.wants_usage_chunk)
    except ClientGone:
        raise ApiError(499, "the client hung up") from None
    finally:
        if not is_handed_over:
            generation.close()


# --- from bodies to requests ---


class Service:
    """A bundle at work: what all routes share."""

    def __init__(self, bundle: Bundle, engine: EngineThread, name: str, deadline_s: float) -> None:
        self.config, self.tokenizer = bundle.model.config, bundle.tokenizer
        self.engine, self.name, self.deadline_s = engine, name, deadline_s
        self.metrics = Metrics(lambda: engine.stats)
        self.detokenizer = Detokenizer(bundle.tokenizer)
        self.max_prompt_tokens = self.config.context_length - 1  # leaves one for the reply
        self._max_token_bytes = int(bundle.tokenizer.token_bytes.max())
        self._created = int(time.time())

    @property
    def card(self) -> Json:
        """The model's entry in /v1/models."""
        moe_blocks = [block + 1 for block in range(self.config.n_blocks) if self.config.is_moe(block)]
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
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

    async def chat(self, body: ChatRequest) -> Generation:
        """Begin to reply to a conversation."""
        self._check(body)
        conversation = conversation_of(body.messages)
        characters = sum(len(message.content) for message in conversation.messages)
        ids = await self._encode(characters, "messages", lambda: encode_prompt(conversation, self.tokenizer))
        return self._begin(body, [ids], reply_borders(self.tokenizer))

    async def complete(self, body: CompletionRequest) -> Generation:
        """Begin to continue texts."""
        self._check(body)
        most = self.engine.capacity // (body.n or 1)
        if not 0 < len(body.prompts) <= most:
            raise refusal("prompt", f"expected 1 to {most} prompts, got {len(body.prompts)}")
        return self._begin(body, [await self._prompt(prompt) for prompt in body.prompts], reply_ends(self.tokenizer))

    async def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._encode(
                len(prompt), "prompt", lambda: [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
            )
        if not prompt:
            raise refusal("prompt", "expected at least one id, got an empty list")
        self._check_length(len(prompt), "prompt")
        if max(prompt) >= self.config.vocab_size:
            raise refusal("prompt", f"ids must be below {self.config.vocab_size:,}, got {str(max(prompt))[:30]}")
        return prompt

    async def _encode(self, characters: int, param: str, encode: Callable[[], list[int]]) -> list[int]:
        """The ids of a text, unless it is so long that they cannot fit: nobody should wait for that to be found out."""
        at_least = characters // self._max_token_bytes
        if characters > self.max_prompt_tokens * self._max_token_bytes:
            self._check_length(at_least, param, "more than ")
        ids = await asyncio.to_thread(encode)
        self._check_length(len(ids), param)
        return ids

    def _check_length(self, tokens: int, param: str, more_than: str = "") -> None:
        if tokens > self.max_prompt_tokens or more_than:
            message = (
                f"the prompt has {more_than}{tokens:,} tokens, at most {self.max_prompt_tokens:,} are accepted (the "
                f"model's context is {self.config.context_length:,} with the reply); shorten it"
            )
            raise refusal(param, message, code="context_length_exceeded")

    def _begin(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], end_ids: frozenset[int]
    ) -> Generation:
        """Hand the requests of all replies to the engine: those to one prompt beside each other."""
        n, seed = body.n or 1, secrets.randbits(62) if body.seed is None else body.seed
        default = min(MAX_TOKENS, body.default_max_tokens or self.config.context_length)
        sampling = self._sampling(body)
        requests = [
            Request(
                prompt=prompt,
                max_tokens=body.token_limit or default,
                sampling=sampling,
                end_ids=end_ids,
                stop=stop_function(self.tokenizer, body.stops),
                seed=(seed + number) % SEEDS,
                top_logprobs=body.engine_top_logprobs,
            )
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(n))
        ]
        try:
            submission = self.engine.submit(requests)
        except QueueFull as error:
            raise ApiError(429, str(error), headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        except EngineStopped as error:
            raise ApiError(503, str(error)) from error
        choices = [Choice(index, self.detokenizer, body.stops) for index in range(len(requests))]
        return Generation(self.engine, self.metrics, submission, choices, self.deadline_s)

    def _check(self, body: ChatRequest | CompletionRequest) -> None:
        """Refuse what no prompt could make right, before one is encoded."""
        self.check_name(body.model)
        for name, count, most in (
            ("n", body.n or 1, min(MAX_N, self.engine.capacity)),
            ("stop", len(body.stops), MAX_STOPS),
            ("max_tokens", body.token_limit or 1, MAX_TOKENS),
        ):
            if count > most:
                raise refusal(name, f"expected at most {most:,}, got {str(count)[:30]}")

    def _sampling(self, body: ChatRequest | CompletionRequest) -> SamplingConfig:
        temperature = 1.0 if body.temperature is None else body.temperature
        top_p = 1.0 if body.top_p is None else body.top_p
        return SamplingConfig(
            temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            top_k=body.top_k or 0,
            top_p=max(top_p, MIN_TOP_P),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            logit_bias=self._bias(body.logit_bias or {}),
        )

    def _bias(self, bias: dict[str, float]) -> dict[int, float]:
        for key in bias:
            if not (key.isascii() and key.isdigit() and len(key) < 9 and int(key) < self.config.vocab_size):
                expected = f"expected ids from 0 to {self.config.vocab_size - 1:,} as text"
                raise refusal("logit_bias", f"{expected}, got {key[:30]!r}")
        return {int(key): value for key, value in bias.items()}


def refusal(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field of the body."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def conversation_of(messages: Sequence[protocol.ChatMessage]) -> Conversation:
    if len(messages) > MAX_MESSAGES:
        raise refusal("messages", f"expected at most {MAX_MESSAGES}, got {len(messages)}; drop the oldest")
    try:
        conversation = Conversation(
            tuple(Message("system" if m.role == "developer" else m.role, m.text) for m in messages)
        )
    except ValueError as error:
        raise refusal("messages", str(error)) from error
    if conversation.messages[-1].role != "user":
        raise refusal("messages", "the last one must be the user's, to be replied to")
    return conversation


def stop_function(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[int], bool] | None:
    """What the engine asks, in its own thread, whether a reply is over; it has a text of its own to look at."""
    if not stops:
        return None
    text = TextStream(tokenizer, stops)

    def is_over(token: int) -> bool:
        try:
            return text.stops_at(token)
        except Exception:  # would end everybody's replies; the reply's own text will meet it again, and end only this
            log.exception("the text of a reply could not be followed; it ends here")
            return True

    return is_over
