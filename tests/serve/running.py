"""A real server in a thread, for tests. FastAPI and uvicorn are imported only when one is started."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nanollm.generate.engine import Engine

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
    def engine(self):
        return self.service.engine

    def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing runs or waits any more; the engine's figures are told after its step."""
        wait_until(lambda: self.engine.load == 0 and self.is_idle, timeout_s)

    @property
    def is_idle(self) -> bool:
        """Whether the engine says that it has nothing to do."""
        stats = self.engine.stats
        return stats.running == stats.waiting == 0


def wait_until(is_so, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end, "it did not become so in time"
        time.sleep(0.005)


def app_of(bundle, make_engine=None, **settings):
    """The app of a server with these settings, those of `nanollm.stages.serve.Config`."""
    from nanollm.serve.app import build_app

    max_running = settings.pop("max_running", 8)
    capacity = max_running + settings.pop("max_waiting", 64)
    adapters = settings.pop("adapters", {})
    make_engine = make_engine or (lambda: Engine(bundle.model, rows=max_running, adapters=adapters))
    defaults = {"api_key": "", "deadline_s": 30.0, "cors_origins": []}
    models = {MODEL_NAME: bundle} | dict.fromkeys(adapters, bundle)
    return build_app(models, make_engine, capacity=capacity, **defaults | settings)


@contextmanager
def serving(bundle, **settings) -> Iterator[Running]:
    """A server of this bundle on a free port."""
    from nanollm.serve.server import address_of, build_server, listen

    app = app_of(bundle, **settings)
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
