"""`Collector`: a runtime's metrics for Prometheus, and an endpoint that serves them. Needs ``m3runtime[metrics]``."""

import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Self

from m3runtime.errors import ConfigError, PluginError
from m3runtime.observe.latency import BOUNDS_S, Latency
from m3runtime.observe.metrics import Metrics

try:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector as _Collector
except ImportError as error:
    raise PluginError(f"metrics need prometheus_client ({error}): pip install 'm3runtime[metrics]'") from error

log = logging.getLogger("m3runtime")

_RECALL = {
    "chunks": "Chunks that were recalled for.",
    "memories": "Memories given to chunks.",
    "kept": "Memories that the store held decoded already.",
    "late": "Memories that had not arrived by the deadline.",
    "encoded": "Cold references that were encoded at a recall.",
    "unstored": "Of those, memories that the home had no room for.",
}
_LOOKAHEAD = {
    "hints": "Hints of streams.",
    "cancelled": "Hints that were overtaken.",
    "guesses": "Memories that hints asked for.",
    "hits": "Guesses that were chosen.",
    "beyond": "Guesses that were only lifted.",
    "failed": "Background work that failed.",
}
_STORE = {
    "decoded": "Memories decoded.",
    "hits": "Leases of parts that were ready.",
    "evicted": "Parts that made room for others.",
    "wasted_bytes": "Bytes of parts that were removed before any recall leased them.",
}
_STORE_NOW = {
    "capacity": "Most bytes of parts.",
    "bytes": "Bytes of parts.",
    "parts": "Parts that are ready.",
    "leased": "Parts that recalls lease.",
    "guessed": "Parts that prefetches lease.",
}
_TIER = {
    "hits": "Blocks that were read from the tier.",
    "misses": "Blocks that it did not have.",
    "bytes": "Bytes of slots that were found.",
    "lifted": "Blocks that were lifted from it.",
    "faults": "Calls that failed.",
    "bad_blocks": "Blocks that failed their check.",
    "recovered": "Blocks that passed it when they were read once more.",
    "unanswered": "Blocks wanted while it could not answer.",
}


class Collector(_Collector):
    """Converts snapshots of `Metrics` to metric families. It does not register itself."""

    def __init__(self, snapshot: Callable[[], Metrics]) -> None:
        """``snapshot`` is called at every scrape, from the threads of the endpoint."""
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """No families, so that registering takes no snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """A snapshot as metric families, all named ``m3_...``."""
        metrics = self._snapshot()
        for name, text in _RECALL.items():
            yield CounterMetricFamily(f"m3_recall_{name}", text, value=getattr(metrics.recall, name))
        yield CounterMetricFamily(
            "m3_recall_waited_seconds", "Seconds that recalls waited for other threads.", value=metrics.recall.waited_s
        )
        yield CounterMetricFamily(
            "m3_recall_encode_seconds", "Seconds spent on encoding cold references.", value=metrics.recall.encode_s
        )
        for name, text in _LOOKAHEAD.items():
            yield CounterMetricFamily(f"m3_lookahead_{name}", text, value=getattr(metrics.lookahead, name))
        for name, text in _STORE.items():
            yield CounterMetricFamily(f"m3_store_{name}", text, value=getattr(metrics.store, name))
        for name, text in _STORE_NOW.items():
            yield GaugeMetricFamily(f"m3_store_{name}", text, value=getattr(metrics.store, name))
        yield _histogram("m3_recall_stage_seconds", "Stages of recalls.", "stage", metrics.recall_stages)
        yield _histogram("m3_lookahead_stage_seconds", "Background work, by stage.", "stage", metrics.lookahead_stages)
        yield from _tiers(metrics)


class Endpoint:
    """Serves metrics over HTTP until it is closed. Raises `ConfigError` if it cannot listen on the address."""

    def __init__(self, snapshot: Callable[[], Metrics], address: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(Collector(snapshot))
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            where = f"{address}:{port}"
            raise ConfigError(f"metrics.port: cannot listen at {where}: {error.strerror or error}") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop to listen, and end all threads. Closing twice is fine."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(snapshot: Callable[[], Metrics], address: str, port: int) -> Endpoint | None:
    """An `Endpoint`, or None with a warning in the log if another process listens on the port."""
    try:
        return Endpoint(snapshot, address, port)
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            log.warning("%s; nobody can watch this process", error)
            return None
        raise


def _tiers(metrics: Metrics) -> Iterator[Metric]:
    for name, text in _TIER.items():
        counter = CounterMetricFamily(f"m3_tier_{name}", text, labels=["tier"])
        for tier in metrics.tiers:
            counter.add_metric([tier.stats.name], getattr(tier.stats, name))
        yield counter
    blocks = GaugeMetricFamily("m3_tier_blocks", "Blocks held now.", labels=["tier"])
    capacity = GaugeMetricFamily("m3_tier_capacity_bytes", "Bytes of blocks held at most.", labels=["tier"])
    for tier in metrics.tiers:
        if tier.blocks is not None:
            blocks.add_metric([tier.stats.name], tier.blocks)
        if tier.capacity is not None:
            capacity.add_metric([tier.stats.name], tier.capacity)
    yield blocks
    yield capacity
    reads = {tier.stats.name: tier.read for tier in metrics.tiers}
    yield _histogram("m3_tier_read_seconds", "Calls that read from the tier.", "tier", reads)


def _histogram(name: str, text: str, label: str, latencies: Mapping[str, Latency]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=[label])
    bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
    for key, latency in latencies.items():
        buckets = list(zip(bounds, map(float, accumulate(latency.buckets)), strict=True))
        family.add_metric([key], buckets, latency.sum_s)
    return family
