"""A real server in a thread, for tests. FastAPI and uvicorn are imported only when one is started."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MODEL_NAME = "tiny"


@dataclass(frozen=True)
class Running:
    url: str
    app: Any
    server: Any

    @property
    def service(self):
        return self.app.state.service

    @property
    def worker(self):
        return self.service.worker

    def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing runs or waits any more; the engine's figures are told after its step."""
        wait_until(lambda: self.worker.load == 0 and self.is_idle, timeout_s)

    @property
    def is_idle(self) -> bool:
        """Whether the engine says that it has nothing to do."""
        figures = self.worker.figures
        return figures.running == figures.waiting == 0


def wait_until(is_so, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not become so in time"
        time.sleep(0.005)


@contextmanager
def serving(bundle, *, api_key: str = "", make_engine=None, **limits) -> Iterator[Running]:
    """A server of this bundle on a free port, with these limits."""
    from nanollm.serve.app import ServeConfig, build_app
    from nanollm.serve.limits import Limits
    from nanollm.serve.server import address_of, build_server, listen

    defaults = {"max_running": 8, "max_waiting": 64, "deadline_s": 30.0}
    config = ServeConfig(model_name=MODEL_NAME, api_key=api_key, limits=Limits(**defaults | limits))
    app = build_app(bundle, config, make_engine)
    server, listener = build_server(app), listen("127.0.0.1", 0)
    url = address_of(listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 30)
        yield Running(url, app, server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
