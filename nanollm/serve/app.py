"""The server as an ASGI app: what every path answers, and how a valid body becomes requests to the engine."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from nanollm import __version__
from nanollm.bundle import Bundle
from nanollm.generate.constraints import TEXT, Compiler, Constraint, Examiner, reply_grammar
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.sampling import MIN_TEMPERATURE, SamplingConfig
from nanollm.generate.tools import tool_caller
from nanollm.serve.engine_thread import STOPPED, EngineThread
from nanollm.serve.metrics import Meter, Metrics
from nanollm.serve.protocol import (
    ApiError,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FunctionTool,
    Json,
    TokenizeRequest,
    error_body,
    explain,
    fault_of,
)
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
from nanollm.text.chat import Conversation, Message, encode_prompt, function_text, reply_borders, reply_ends
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import CALL

MIN_TOP_P = 1e-9  # what top_p 0 means: the most likely token alone
SEEDS = 2**63
PAGE = Path(__file__).parent / "page"
ERRORS: dict[int | str, dict[str, Any]] = {"default": {"description": "An error in OpenAI's form."}}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_app(
    models: Mapping[str, Bundle],
    make_engine: Callable[[], Engine],
    *,
    api_key: str,
    capacity: int,
    deadline_s: float,
    cors_origins: Sequence[str],
) -> FastAPI:
    """The server of a bundle, whose engine starts and ends with it.

    models: by their names in the API, first the bundle, then what it is with each of the engine's adapters;
    api_key: empty if none is asked for; capacity: how many replies are taken on at once, running and waiting.
    """
    service = Service(models, EngineThread(make_engine, capacity), deadline_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            await asyncio.to_thread(service.examiner.stop)

    app = FastAPI(
        title="NanoLLM",
        version=__version__,
        description="A small language model behind the forms of OpenAI's API.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(build_routes(service))
    app.mount("/page", StaticFiles(directory=PAGE))
    for failure in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(failure, _answer_failure)
    app.add_middleware(Guard, api_key=api_key)
    if cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            max_age=600,
        )
    app.add_middleware(Meter, metrics=service.metrics)
    return app


async def _answer_failure(request: HttpRequest, error: Exception) -> JSONResponse:
    """Whatever fails, ours or the framework's, in OpenAI's form; a fault of ours is logged by uvicorn."""
    if isinstance(error, ApiError):
        return error.response
    if isinstance(error, RequestValidationError):
        message, param = explain(error.errors(), error.body)
        return JSONResponse(error_body(400, message, param=param), 400)
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        if error.status_code == 404:
            detail = nothing_at(request)
        elif error.status_code == 405:
            detail = f"{request.method} is not for this path"
            if request.method == "OPTIONS" and "origin" in request.headers:
                detail += "; pages of other origins need the server's option --cors_origins"
        elif isinstance(error.__cause__, UnicodeDecodeError):  # FastAPI's, who does not say it
            detail = f"the body is not valid JSON: {fault_of(error.__cause__)}"
        elif isinstance(error.__cause__, RecursionError):
            detail = "the body is not valid JSON: it is nested too deeply"
        return JSONResponse(error_body(error.status_code, detail), error.status_code, error.headers)
    return JSONResponse(error_body(500, "the server failed; its log says why"), 500)


def nothing_at(request: HttpRequest) -> str:
    """That a path has no answer, and which path may have been meant."""
    path = request.url.path
    paths = [*request.app.openapi()["paths"]]
    ends = [known for known in paths if path.endswith(known.removeprefix("/v1"))]  # too little or much before it
    meant = ends or get_close_matches(path[:200], paths, 1, 0.8)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    return f"there is nothing at {path[:200]}{hint}"


# --- routes ---


def build_routes(service: "Service") -> APIRouter:
    """What clients call; all but /health need the key, if there is one."""
    router = APIRouter(responses=ERRORS)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(PAGE / "index.html")

    @router.get("/health")
    async def health() -> Response:
        """Whether the server can reply."""
        if not service.engine.is_alive:
            raise ApiError(503, STOPPED)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [service.card(name) for name in service.models]})

    @router.get("/v1/models/{model}")
    async def model(model: str) -> Response:
        """What there is to know of a model."""
        service.check_name(model)
        return JSONResponse(service.card(model))

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """Reply to a conversation."""
        generation = await service.chat(body)
        formatter = ChatFormatter(
            body.model, service.detokenizer, has_logprobs=bool(body.logprobs), has_experts=bool(body.experts)
        )
        return await answer(body, generation, formatter, request)

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue texts."""
        generation = await service.complete(body)
        formatter = TextFormatter(body.model, service.detokenizer, has_logprobs=body.logprobs is not None)
        return await answer(body, generation, formatter, request)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The ids of a text or a conversation."""
        return JSONResponse(await service.tokenize(body))

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of ids, without marks."""
        return JSONResponse({"prompt": service.detokenize(body)})

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

    def __init__(self, models: Mapping[str, Bundle], engine: EngineThread, deadline_s: float) -> None:
        self.models, (self.name, bundle) = models, next(iter(models.items()))
        self.config, self.tokenizer = bundle.model.config, bundle.tokenizer
        self.make_tools = {name: tool_caller(each) for name, each in models.items()}
        self.engine, self.deadline_s = engine, deadline_s
        self.metrics = Metrics(lambda: engine.stats)
        self.detokenizer, self.examiner = Detokenizer(bundle.tokenizer), Examiner(Compiler(bundle.tokenizer))
        self._compiling = asyncio.Lock()
        self._max_token_bytes = int(bundle.tokenizer.token_bytes.max())
        self._created = int(time.time())

    def card(self, name: str) -> Json:
        """A model's entry in /v1/models, and the shape of it that the page shows."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "nanollm",
            "parent": None if name == self.name else self.name,
            "context_length": self.config.context_length,
            "moe_blocks": [block + 1 for block in range(self.config.n_blocks) if self.config.is_moe(block)],
            "n_routed_experts": self.config.n_routed_experts,
            "examples": self.models[name].examples,
        }

    def check_name(self, name: str) -> None:
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            message = f"there is no model {name[:100]!r} here, only {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, body: ChatRequest) -> Generation:
        """Begin to reply to a conversation."""
        self._check(body, 1)
        if body.tools and CALL not in self.tokenizer.symbols.values():
            raise refusal("tools", "this model's tokenizer has no mark for calls")
        conversation = conversation_of(body.messages, () if body.tool_choice == "none" else body.tools or ())
        texts = [*conversation.tools, *(message.content for message in conversation.messages)]
        texts += [call.text for message in conversation.messages for call in message.tool_calls]
        size = sum(map(len, texts))
        ids = await self._encode(size, "messages", lambda: encode_prompt(conversation, self.tokenizer))
        return self._begin(body, [ids], reply_borders(self.tokenizer), await self._constraint(body))

    async def complete(self, body: CompletionRequest) -> Generation:
        """Begin to continue texts."""
        self._check(body, len(body.prompts))
        prompts = [await self._prompt(prompt) for prompt in body.prompts]
        return self._begin(body, prompts, reply_ends(self.tokenizer), await self._constraint(body))

    async def _constraint(self, body: ChatRequest | CompletionRequest) -> Constraint | None:
        """What the replies must look like; one after the other, because a large schema takes a core for a while."""
        field, make_rule = next(iter(body.forms), ("tools", None))
        if make_rule is None and not body.calls.functions:
            return None
        try:
            grammar = reply_grammar(make_rule() if make_rule else TEXT, self.tokenizer, body.calls)
            async with self._compiling:
                return await asyncio.to_thread(self.examiner.compile, grammar)
        except (ValueError, RecursionError) as error:
            raise refusal(field, str(error)) from error

    async def tokenize(self, body: TokenizeRequest) -> Json:
        self.check_name(body.model or self.name)
        conversation = conversation_of(body.messages, body.tools or ()) if body.messages else None

        def encode() -> list[int]:
            if conversation is not None:
                return encode_prompt(conversation, self.tokenizer)
            bos = [self.tokenizer.bos_id] if body.add_special_tokens else []
            return [*bos, *self.tokenizer.encode(body.prompt or "")]

        try:
            ids = await asyncio.to_thread(encode)
        except ValueError as error:  # a lone surrogate
            raise refusal("messages" if body.messages else "prompt", str(error)) from error
        names = [self.detokenizer.spell(token)[0] for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.config.context_length, "tokens": ids, "token_strs": names}

    def detokenize(self, body: DetokenizeRequest) -> str:
        self.check_name(body.model or self.name)
        if body.tokens and max(body.tokens) >= self.config.vocab_size:
            last = self.config.vocab_size - 1
            raise refusal("tokens", f"expected ids from 0 to {last:,}, got {max(body.tokens)}")
        return self.tokenizer.decode(body.tokens)

    async def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_id
            return await self._encode(len(prompt), "prompt", lambda: [bos, *self.tokenizer.encode(prompt)])
        self._check_length(len(prompt), "prompt")
        return prompt

    async def _encode(self, characters: int, param: str, encode: Callable[[], list[int]]) -> list[int]:
        """The ids of a text, unless it is so long that they cannot fit: encoding it would keep the others waiting."""
        self._check_length(characters // self._max_token_bytes, param)
        try:
            ids = await asyncio.to_thread(encode)
        except ValueError as error:  # a lone surrogate
            raise refusal(param, str(error)) from error
        self._check_length(len(ids), param)
        return ids

    def _check_length(self, tokens: int, param: str) -> None:
        limit = self.config.context_length
        if tokens >= limit:
            message = f"the prompt has at least {tokens:,} tokens, the model's context is {limit:,}; shorten it"
            raise refusal(param, message, code="context_length_exceeded")

    def _check(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        """Refuse what no prompt could make right, before one is encoded."""
        self.check_name(body.model)
        if (replies := prompts * (body.n or 1)) > self.engine.capacity:
            raise refusal("n", f"expected at most {self.engine.capacity} replies to all prompts, got {replies}")

    def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        stop_token_ids: frozenset[int],
        constraint: Constraint | None,
    ) -> Generation:
        """Hand the requests of all replies to the engine: those to one prompt beside each other."""
        seed = secrets.randbits(62) if body.seed in (None, -1) else body.seed
        sampling, limit = sampling_of(body), body.token_limit
        make_tool = self.make_tools[body.model] if constraint is None else None
        is_echo = isinstance(body, CompletionRequest) and bool(body.echo)
        if is_echo and limit <= 1:
            # A single token is told even where it ends the text: for lm_eval the prompt's are all but the last.
            stop_token_ids, make_tool = frozenset(), None
        requests = [
            Request(
                prompt=prompt,
                max_tokens=max(1, limit),
                sampling=sampling,
                stop_token_ids=stop_token_ids,
                stop=TextStream(self.tokenizer, body.stops).stops_at if body.stops else None,
                tool=make_tool() if make_tool else None,
                constraint=constraint.copy() if constraint else None,
                adapter=None if body.model == self.name else body.model,
                seed=(seed + number) % SEEDS,
                top_logprobs=body.engine_top_logprobs,
                prompt_logprobs=body.engine_top_logprobs if is_echo else None,
            )
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n or 1))
        ]
        submission = self.engine.submit(requests)
        call_id = self.tokenizer.mark_id(CALL) if body.calls.functions else None
        choices = [
            Choice(index, self.detokenizer, body.stops, call_id, request.prompt if is_echo else (), has_reply=limit > 0)
            for index, request in enumerate(requests)
        ]
        return Generation(self.engine, self.metrics, submission, choices, self.deadline_s)


def sampling_of(body: ChatRequest | CompletionRequest) -> SamplingConfig:
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingConfig(
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, MIN_TOP_P),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )


def refusal(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 about one field of the body."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def conversation_of(given: Sequence[ChatMessage], tools: Sequence[FunctionTool] = ()) -> Conversation:
    """The conversation, with the answers to calls in the order of the calls: the model knows no ids."""
    messages = list[ChatMessage]()
    for are_answers, group in groupby(given, lambda message: message.role == "tool"):
        members = [*group]
        if are_answers:
            ids = [call.id for call in messages[-1].tool_calls or ()] if messages else []
            if stray := [each.tool_call_id for each in members if each.tool_call_id not in ids]:
                raise refusal("messages", f"the message before has no call with the tool_call_id {stray[0]!r:.80}")
            members.sort(key=lambda each: ids.index(str(each.tool_call_id)))
        messages += members
    try:
        functions = tuple(function_text(tool.model_dump()) for tool in tools)
        conversation = Conversation(tuple(Message.of(message.openai) for message in messages), functions)
    except ValueError as error:
        raise refusal("messages", str(error)) from error
    if conversation.messages[-1].role == "assistant":
        raise refusal("messages", "the last one must be the user's or a tool's, to be replied to")
    return conversation
