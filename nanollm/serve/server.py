"""uvicorn with two things added: the address on stdout, and a last event for streams that are cut short by its end.

What lies below HTTP is uvicorn's: malformed requests get its plain 400, and slow clients are a proxy's to cut off.
"""

import asyncio
import gc
import math
import os
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

BACKLOG = 2048
GO_ON_S = 4.0
"""How long replies may go on after the server was asked to stop; then their readers are told that it stops."""
MAX_HEAD_BYTES = 16_384
"""Of a request before its body."""


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
        app.state.service.worker.start()  # here a mistake is still one line; within uvicorn it would be a traceback
        gc.collect()
        gc.freeze()  # what is there by now stays; to look through all of it again would hold everybody up
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
