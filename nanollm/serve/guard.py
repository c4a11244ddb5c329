"""Who may come in, and with how much?

ASGI middleware around everything: the key, the name by which the server was called, the size and the time of a body,
the headers that browsers need, and an answer in our form when a route fails.
"""

import asyncio
import base64
import hashlib
import hmac
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanollm.serve.errors import ApiError
from nanollm.serve.job import ClientGone
from nanollm.serve.limits import BODY_TIMEOUT_S, Limits, is_loopback

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
CLOSE = {"Connection": "close"}  # of a refusal while the body may still be coming
DRAINED = 8
"""A body that is too large is read up to this many times the limit, so that its sender gets to hear the answer."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets in what carries the key and is not too large; without a key, what was sent to a name of this machine."""

    def __init__(self, app: ASGIApp, api_key: str, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._key = _digest(api_key) if api_key else None  # the key itself is not kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            body = await self._read(scope, receive)
            await self.app(scope, _replay(body, receive), send_guarded)
        except ApiError as error:
            await error.response(scope, receive, send_guarded)
        except ClientGone:
            log.debug("a client hung up before its request was complete")
        except Exception:
            if has_begun:
                raise
            log.exception("%s %r failed", scope["method"], scope["path"][:200])  # quoted: it may hold line ends
            await ApiError(500, "the server failed; its log says why").response(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:  # two readers may see two ends
            message = "Content-Length and Transfer-Encoding differ about where the body ends"
            raise ApiError(400, message, headers=CLOSE)
        if self._key is None:
            host = headers.get("host", "")
            if not is_loopback(_without_port(host)):  # another site's name, made to point here
                message = (
                    f"without a key this server answers only to localhost, got {host[:100]!r}; set NANOLLM_API_KEY"
                )
                raise ApiError(403, message, headers=CLOSE)
        elif scope["path"] not in OPEN_PATHS and not hmac.compare_digest(self._key, _digest(given_key(headers))):
            scheme = "Basic" if scope["path"] == "/" else "Bearer"  # a browser then asks for a password
            raise ApiError(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                headers=CLOSE | {"WWW-Authenticate": f'{scheme} realm="nanollm"'},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body; 413 if it is too large, 408 if it takes too long."""
        limit, headers = self.limits.max_body_bytes, Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit and (int(declared) > DRAINED * limit or "expect" in headers):
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _receive_all(receive, limit)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds"
            raise ApiError(408, message, headers=CLOSE) from None
        if body is None:
            raise self._too_large()
        return body

    def _too_large(self) -> ApiError:
        message = f"the body must have at most {self.limits.max_body_bytes:,} bytes; send less"
        return ApiError(413, message, headers=CLOSE)


class Cors(CORSMiddleware):
    """Starlette's, with refusals in our form."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return ApiError(400, "this origin is not among the server's --cors_origins").response


def given_key(headers: Headers) -> str:
    """The key in a request: a bearer token, or the password of HTTP Basic with any user name; empty if none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # not ASCII, not base64, or not UTF-8 in it
            return ""
    return ""


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing takes equal time."""
    return hashlib.sha256(key.encode()).digest()


def _without_port(host: str) -> str:
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _receive_all(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if it is longer than the limit."""
    parts: list[bytes] = []
    size, is_last = 0, False
    while not is_last and size <= DRAINED * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        is_last = not message.get("more_body", False)
    return b"".join(parts) if size <= limit else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body at once, and after it what the server says: that the client hung up."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give
