"""Who listens on the port, tells when it is ready, and ends in good order?

uvicorn, with a few things added: the address on stdout, time limits, our form for what is not HTTP, and a word to those
whose replies are cut short at the end.
"""

import asyncio
import json
import math
import os
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanollm.serve.errors import error_body

HEADERS_TIMEOUT_S = 10.0
"""How long a connection may be without a whole request."""
READER_TIMEOUT_S = 60.0
"""How long a reader may leave what was sent to it where it is."""
BACKLOG = 2048
GO_ON_S = 4.0
"""How long replies may go on after the server was asked to stop; then their readers are told that it stops."""


class PatientOnlySoLong(H11Protocol):
    """uvicorn's protocol, without its patience for who sends a request or reads an answer too slowly, or never."""

    _headers_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_timer = self.loop.call_later(READER_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._reader_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._headers_timer)
        _cancel(self._reader_timer)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_body(400, msg)).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _watch_headers(self) -> None:
        """The time runs while no request is being answered, from the first moment of that on."""
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._headers_timer)
            self._headers_timer = None
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self.timeout_keep_alive_handler)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which says on stdout where it is, and in good time tells its clients that it ends."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            print(address_of(sockets[0]), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert isinstance(self.config.app, FastAPI)
        give_up = asyncio.get_running_loop().call_later(GO_ON_S, self.config.app.state.service.worker.end)
        await super().shutdown(sockets=sockets)
        give_up.cancel()


def build_server(app: FastAPI) -> Server:
    """A server of this app, to be run with the socket that `listen` opens."""
    config = uvicorn.Config(
        app,
        http=PatientOnlySoLong,
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
        app.state.service.worker.start()  # here a mistake is still one line; within uvicorn it would be a traceback
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
