"""Which paths are there, and what does each do?"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json

from nanollm.serve.answers import ChatAnswer, ChatForm, Form, Health, Json, ModelCard, ModelList, TextAnswer, TextForm
from nanollm.serve.errors import ApiError, ErrorBody
from nanollm.serve.job import ClientGone, Job, while_listening
from nanollm.serve.schemas import ChatRequest, CompletionRequest
from nanollm.serve.service import Service
from nanollm.serve.stream import EventStream


def said(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the API's description: the errors that a route answers with."""
    return {status: {"model": ErrorBody} for status in statuses}


REFUSALS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class StrictRequest(Request):
    """A request whose body is JSON in UTF-8, without NaN and not nested out of reason."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class StrictRoute(APIRoute):
    """A route that takes application/json and nothing else, so that no form of another page can post to it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, f"expected the content-type application/json, got {kind[:100] or 'none'}")
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_json


def build_router(service: Service) -> APIRouter:
    """The routes that clients call."""
    router = APIRouter(route_class=StrictRoute, responses=said(401, 403))

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [service.card]})

    @router.get("/v1/models/{model}", response_model=ModelCard, responses=said(404))
    async def model(model: str) -> Response:
        """What there is to know of a model."""
        service.check_name(model)
        return JSONResponse(service.card)

    @router.post("/v1/chat/completions", response_model=ChatAnswer, responses=STREAMED | said(*REFUSALS))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation."""
        job = await service.chat(body)
        form = ChatForm(service.name, service.speller, has_logprobs=bool(body.logprobs), has_experts=bool(body.experts))
        return await answer(body, job, form, request)

    @router.post("/v1/completions", response_model=TextAnswer, responses=STREAMED | said(*REFUSALS))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        job = await service.complete(body)
        form = TextForm(service.name, service.speller, has_logprobs=body.logprobs is not None)
        return await answer(body, job, form, request)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def build_health(service: Service) -> APIRouter:
    """The one route that needs no key."""
    router = APIRouter()

    @router.get("/health", response_model=Health, responses=said(403, 503))
    async def health() -> Response:
        """Whether the server can reply."""
        if not service.worker.is_alive:
            raise ApiError(503, "the engine has stopped; start the server again")
        return JSONResponse({"status": "ok"})

    return router


async def answer(body: ChatRequest | CompletionRequest, job: Job, form: Form, request: Request) -> Response:
    """The replies at once, or a stream of them; whatever fails before the first token is an answer of its own."""
    is_handed_over = False
    try:
        if not body.stream:
            return JSONResponse(form.answer(job, await while_listening(job.rest(), request.receive)))
        first = await while_listening(job.next(), request.receive)
        is_handed_over = True
        return EventStream(form, job, first, has_usage=body.wants_usage_chunk)
    except ClientGone:
        raise ApiError(499, "the client hung up") from None
    finally:
        if not is_handed_over:
            job.close()


def without_422(description: Json) -> Json:
    """The API's description as it is: what does not fit the schema is answered with 400, in our form."""
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description.get("components", {}).get("schemas", {}).pop(name, None)
    return description
