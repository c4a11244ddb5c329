"""Counters and histograms for Prometheus, and the middleware that counts requests."""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanollm.serve.engine_thread import EngineStats

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
REQUEST_S = (0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """The numbers of one server; the engine's own counters are read when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats, self._registry = stats, CollectorRegistry()
        self.requests = Counter("nanollm_requests", "Answers.", ["route", "status"], registry=self._registry)
        self.request_s = self._histogram("nanollm_request_seconds", "Time of a whole request.", REQUEST_S, "route")
        self.first_token_s = self._histogram(
            "nanollm_time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_S
        )
        self.token_s = self._histogram(
            "nanollm_time_per_output_token_seconds",
            "Mean time between the tokens of a reply, once for each request.",
            TOKEN_S,
        )
        self._registry.register(self)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def exposition(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        yield CounterMetricFamily("nanollm_prompt_tokens", "Prompt tokens read.", now.prompt_tokens)
        yield CounterMetricFamily("nanollm_reused_tokens", "Prompt tokens found in the cache.", now.reused_tokens)
        yield CounterMetricFamily("nanollm_generated_tokens", "Tokens drawn.", now.drawn_tokens)
        yield GaugeMetricFamily("nanollm_waiting_replies", "Replies without a row of the cache.", now.waiting)
        yield GaugeMetricFamily("nanollm_running_replies", "Replies being written.", now.running)
        yield GaugeMetricFamily("nanollm_cache_bytes", "Size of the cache.", now.cache_bytes)


class Meter:
    """ASGI: count every request by its route (never by its path, which anybody can make up) and its status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), "500"  # until an answer begins

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.request_s.labels(route).observe(time.perf_counter() - began)
