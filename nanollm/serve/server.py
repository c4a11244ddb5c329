"""Who listens on the port, tells when it is ready, and ends in good order?

uvicorn, with a few things added: the address on stdout, limits of time and of work, our form for what is not HTTP, and
a word to those whose replies are cut short at the end.
"""

import asyncio
import gc
import json
import math
import os
import re
import signal
import socket
import sys
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanollm.serve.errors import LONGEST_ECHO, error_body

HEADERS_TIMEOUT_S = 10.0
"""How long a connection may be without a whole request."""
READER_TIMEOUT_S = 60.0
"""How long a reader may leave what was sent to it where it is."""
BACKLOG = 2048
GO_ON_S = 4.0
"""How long replies may go on after the server was asked to stop; then their readers are told that it stops."""
MOST_HEAD_BYTES = 16_384
MOST_HEAD_LINES = 100
"""Bytes and lines of a request before its body."""
FREE_PIECES = 256
LEAST_MEAN_PIECE = 256
"""A body may come in this many pieces of any size; of more, the mean must have at least this many bytes."""
MOST_UNHEARD_BYTES = 1_048_576
"""What is still read of a body after the answer, so that its sender gets to hear the answer."""

END_OF_HEAD = re.compile(rb"\n\r?\n")


class Connection(h11.Connection):
    """h11's, which parses in Python while everybody else waits, and is therefore not given everything to parse."""

    _pieces = _body_bytes = 0

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            self._check_head()
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._body_bytes = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding differ about where the body ends")
        elif isinstance(event, h11.Data):
            self._check_body(len(event.data))
        return event

    def _check_head(self) -> None:
        head = END_OF_HEAD.split(self.trailing_data[0], maxsplit=1)[0]
        if len(head) > MOST_HEAD_BYTES or head.count(b"\n") > MOST_HEAD_LINES:
            message = f"expected at most {MOST_HEAD_LINES} headers and {MOST_HEAD_BYTES:,} bytes of them; send fewer"
            raise h11.RemoteProtocolError(message, error_status_hint=431)

    def _check_body(self, size: int) -> None:
        self._pieces += 1
        self._body_bytes += size
        if self._pieces > FREE_PIECES and self._body_bytes < LEAST_MEAN_PIECE * self._pieces:
            raise h11.RemoteProtocolError(
                f"the body comes in pieces of under {LEAST_MEAN_PIECE} bytes; send larger ones"
            )
        if self.our_state is h11.DONE and self._body_bytes > MOST_UNHEARD_BYTES:
            raise h11.RemoteProtocolError("the answer was given long ago, and the body does not end")


class PatientOnlySoLong(H11Protocol):
    """uvicorn's protocol, without its patience for who sends a request or reads an answer too slowly, or never."""

    _headers_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Connection(h11.SERVER, MOST_HEAD_BYTES)

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
        """Called while an error of h11 is handled, which knows better than `msg` what was wrong."""
        error = sys.exception()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # otherwise there is an answer already
            status = 431 if isinstance(error, h11.ProtocolError) and error.error_status_hint == 431 else 400
            body = json.dumps(error_body(status, f"this cannot be read: {str(error or msg)[:LONGEST_ECHO]}")).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
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
        gc.collect()
        gc.freeze()  # what is there by now stays; to look through all of it again would hold everybody up
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
