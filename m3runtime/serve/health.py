"""``/health`` and ``/metrics``: is the server alive, does it take requests, and what does it do?"""

from collections.abc import Iterator

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as _Collector

from m3runtime.observe.prometheus import Collector, histogram
from m3runtime.serve.errors import ApiError
from m3runtime.serve.events import Data
from m3runtime.serve.served import Served


def router(served: Served) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    registry = CollectorRegistry()
    registry.register(Collector(served.runtime.metrics))
    registry.register(_ServeCollector(served))

    @routes.get("/health")
    @routes.get("/health/live")
    async def live() -> Data:
        """The process answers."""
        return {"status": "ok"}

    @routes.get("/health/ready")
    async def ready() -> Data:
        """New requests are taken. 503 while the server is being stopped."""
        if served.gate.is_closing:
            raise ApiError(503, "the server is being stopped", code="shutting_down", retry_after=5)
        return {"status": "ok", "model": served.name}

    @routes.get("/metrics")
    def metrics() -> Response:
        """Counters and latencies of the server, recalls and tiers, for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes


class _ServeCollector(_Collector):
    """The metrics of the server itself."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def describe(self) -> list[Metric]:
        """No families, so that registering takes no snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, named ``m3_serve_...``."""
        meter, gate, rows = self._served.meter, self._served.gate, self._served.config.model.rows
        taken = gate.taken
        yield GaugeMetricFamily("m3_serve_rows", "Answers under way that have a row.", value=min(taken, rows))
        yield GaugeMetricFamily("m3_serve_queue", "Answers that wait for a row.", value=max(0, taken - rows))
        yield GaugeMetricFamily("m3_serve_places", "Most answers under way or waiting.", value=gate.places)
        requests, tokens, answers = meter.snapshot()
        family = CounterMetricFamily("m3_serve_requests", "Requests.", labels=["route", "status"])
        for (route, status), count in requests.items():
            family.add_metric([route, str(status)], count)
        yield family
        for name, text, label, counts in (
            ("m3_serve_tokens", "Tokens.", "kind", tokens),
            ("m3_serve_answers", "Answers, by how they ended.", "end", answers),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family
        yield histogram(
            "m3_serve_token_seconds",
            "Time to the first token of an answer, and between its tokens.",
            "token",
            {"first": meter.first_token.latency(), "next": meter.between_tokens.latency()},
        )
