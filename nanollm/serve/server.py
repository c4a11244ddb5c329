"""Who may come in and with how much, and uvicorn, which listens.

`Guard` is ASGI middleware around everything: the key, the name by which the server was called, the size of a body and
the headers that browsers need. What lies below HTTP is uvicorn's, and slow clients are a proxy's to cut off.
"""

import asyncio
import base64
import gc
import hmac
import ipaddress
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

OPEN_PATHS = frozenset({"/health"})
MAX_BODY_BYTES = 2**20
MAX_DRAINED_BYTES = 8 * MAX_BODY_BYTES
"""A body that is too large is read up to here, so that its sender gets to hear the answer."""
MAX_HEAD_BYTES = 16_384  # of a request before its body
BACKLOG = 2048
GRACE_S = 4.0
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

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            if len(scope["path"]) > 1:
                scope["path"] = scope["path"].removesuffix("/")  # another name of the same
            await self.app(scope, limited(receive), send_with_headers)
        except ApiError as error:
            await error.response(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:  # two readers may see two ends
            message = "Content-Length and Transfer-Encoding differ about where the body ends"
            raise ApiError(400, message, headers=CLOSE)
        if not self._key:
            host = headers.get("host", "")
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):  # another site's name, made to point here
                message = (
                    f"without a key this server answers only to localhost, got {host[:100]!r}; set NANOLLM_API_KEY"
                )
                raise ApiError(403, message, headers=CLOSE)
        elif scope["path"] not in OPEN_PATHS and not hmac.compare_digest(self._key, given_key(headers).encode()):
            scheme = "Basic" if scope["path"] == "/" else "Bearer"  # a browser then asks for a password
            raise ApiError(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                headers=CLOSE | {"WWW-Authenticate": f'{scheme} realm="nanollm"'},
            )
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > MAX_DRAINED_BYTES:
            raise too_large()


class Cors(CORSMiddleware):
    """Tells browsers which other pages may call the server, and whoever asks for more what is refused."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 400:
            origin, method = request_headers["origin"][:100], request_headers["access-control-request-method"][:100]
            known = f"expected {' or '.join(self.allow_methods)} from an origin that --cors_origins lists"
            refused = ApiError(400, f"{bytes(response.body).decode()}: {known}, got {method} from {origin!r}").response
            response.body = refused.body
            response.headers.update(refused.headers)
        return response


def limited(receive: Receive) -> Receive:
    """The same receive, but ApiError 413 for a body above the limit."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        while MAX_BODY_BYTES < size <= MAX_DRAINED_BYTES and message.get("more_body"):
            message = await receive()
            size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise too_large()
        return message

    return receive_limited


def too_large() -> ApiError:
    return ApiError(413, f"the body must have at most {MAX_BODY_BYTES:,} bytes; send less", headers=CLOSE)


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


# --- uvicorn ---


class Server(uvicorn.Server):
    """uvicorn's server, which says on stdout where it is, and in good time tells its clients that it ends."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            print(address_of(sockets[0]), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert isinstance(self.config.app, FastAPI)
        give_up = asyncio.get_running_loop().call_later(GRACE_S, self.config.app.state.service.engine.end)
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
        timeout_graceful_shutdown=math.ceil(GRACE_S) + 2,
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
        app.state.service.examiner.start()
        gc.collect()
        gc.freeze()  # what is there by now stays; to look through all of it again would hold everybody up
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
