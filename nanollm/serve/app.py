"""How do the parts become one server?"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from nanollm import __version__
from nanollm.bundle import Bundle
from nanollm.generate.engine import Engine
from nanollm.serve.errors import ApiError, error_body, explain
from nanollm.serve.guard import Cors, Guard
from nanollm.serve.limits import Limits
from nanollm.serve.metrics import Meter
from nanollm.serve.routes import build_health, build_router, without_422
from nanollm.serve.service import Service
from nanollm.serve.static import build_page, read_page


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server is made of, beside its bundle."""

    model_name: str = "nanollm"
    api_key: str = field(default="", repr=False)
    """Empty: none is asked for."""
    limits: Limits = field(default_factory=Limits)


def build_app(bundle: Bundle, config: ServeConfig, make_engine: Callable[[], Engine] | None = None) -> FastAPI:
    """The server as an ASGI app; its engine starts and ends with it. `make_engine`: for another than the plain one."""
    limits = config.limits
    engine = make_engine or (lambda: Engine(bundle.model, rows=limits.max_running))
    service = Service(bundle, limits, config.model_name, engine)
    app = FastAPI(
        title="NanoLLM",
        version=__version__,
        description="A small language model behind the forms of OpenAI's API.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(service),
    )
    app.state.service = service
    app.include_router(build_health(service))
    described = [Depends(HTTPBearer(auto_error=False))] if config.api_key else []  # Guard does the checking
    app.include_router(build_router(service), dependencies=described)
    app.include_router(build_page(read_page()))
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(RequestValidationError, _tell_what_is_invalid)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, api_key=config.api_key, limits=limits)
    if limits.cors_origins:
        app.add_middleware(
            Cors, allow_origins=limits.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"], max_age=600
        )
    app.add_middleware(Meter, metrics=service.metrics)
    return app


def _lifespan(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)

    return live


def _describe(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        description = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        app.openapi_schema = without_422(description)
    return app.openapi_schema


async def _tell(request: Request, error: Exception) -> JSONResponse:
    """Any error with a status, ours or the framework's."""
    if isinstance(error, ApiError):
        return error.response
    assert isinstance(error, HTTPException)
    message = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
    detail = message.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, detail), error.status_code, error.headers)


async def _tell_what_is_invalid(request: Request, error: Exception) -> JSONResponse:
    """What in a body does not fit: where, what was expected, what came."""
    assert isinstance(error, RequestValidationError)
    message, param = explain(error.errors(), error.body)
    return JSONResponse(error_body(400, message, param=param), 400)
