"""The door: who may come in and with how much, and uvicorn, which listens.

`Guard` is ASGI middleware around everything: the key, the name by which the server was called, a body's size and time,
the headers that browsers need, and an answer in our form when a route fails. What lies below HTTP is uvicorn's:
malformed requests get its plain 400, and slow clients are a proxy's to cut off.
"""

import asyncio
import base64
import gc
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanollm.serve.protocol import ApiError
from nanollm.serve.streaming import ClientGone

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
BODY_TIMEOUT_S = 10.0
"""Until a request's body must have arrived."""
MAX_DRAINED = 8
"""A body that is too large is read up to this many times the limit, so that its sender gets to hear the answer."""
MAX_HEAD_BYTES = 16_384
"""Of a request before its body."""
BACKLOG = 2048
GO_ON_S = 4.0
"""How long replies may go on after the server was asked to stop; then their readers are told that it stops."""
CLOSE = {"Connection": "close"}  # of a refusal while the body may still be coming
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

    def __init__(self, app: ASGIApp, api_key: str, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
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
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):  # another site's name, made to point here
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
        headers = Headers(scope=scope)
        declared, limit = headers.get("content-length", "0"), self.max_body_bytes
        is_hopeless = declared.isdigit() and int(declared) > limit * (1 if "expect" in headers else MAX_DRAINED)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = None if is_hopeless else await _receive_all(receive, limit)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds"
            raise ApiError(408, message, headers=CLOSE) from None
        if body is None:
            raise ApiError(413, f"the body must have at most {limit:,} bytes; send less", headers=CLOSE)
        return body


class Cors(CORSMiddleware):
    """Starlette's, with refusals in our form."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return ApiError(400, "this origin is not among the server's --cors_origins").response


def checked_key(key: str, host: str) -> str:
    """The key, if it is one and this host is safe with it."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the key must be printable ASCII without spaces, as it travels in a header")
    if not key and not is_loopback(host):
        raise ValueError(
            f"host {host} can be reached from other machines, so a key is needed: set NANOLLM_API_KEY; "
            f"or serve this machine only, with --host 127.0.0.1"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host's name or address."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


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


async def _receive_all(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if it is longer than the limit."""
    body, size, is_last = bytearray(), 0, False
    while not is_last and size <= MAX_DRAINED * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            body += part
        is_last = not message.get("more_body", False)
    return bytes(body) if size <= limit else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body at once, and after it what the server says: that the client hung up."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return messages.pop() if messages else await receive()

    return give


# --- uvicorn ---


class Server(uvicorn.Server):
    """uvicorn's server, which says on stdout where it is, and in good time tells its clients that it ends."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            print(address_of(sockets[0]), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert isinstance(self.config.app, FastAPI)
        give_up = asyncio.get_running_loop().call_later(GO_ON_S, self.config.app.state.service.engine.end)
        await super().shutdown(sockets=sockets)
        give_up.cancel()


def build_server(app: FastAPI) -> Server:
    """A server of this app, to be run with the socket that `listen` opens."""
    config = uvicorn.Config(
        app,
        http="h11",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(GO_ON_S) + 2,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address; OSError with the reason if that is not possible. Port 0: any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends small packets at once; otherwise each token may wait 40 ms for the next.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """http://HOST:PORT of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGINT (KeyboardInterrupt follows) or SIGTERM (SystemExit 143)."""

    def leave(*_: object) -> None:
        sys.exit(143)

    server, listener = build_server(app), listen(host, port)
    before = signal.signal(signal.SIGTERM, leave)  # uvicorn ends in good order, and then raises the signal again
    try:
        app.state.service.engine.start()  # here a mistake is still one line; within uvicorn it would be a traceback
        gc.collect()
        gc.freeze()  # what is there by now stays; to look through all of it again would hold everybody up
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
