"""`Collector`: a runtime's metrics for Prometheus, and an endpoint that serves them. Needs ``m3runtime[metrics]``."""

import errno
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field
from itertools import accumulate
from typing import Any, Self

from m3runtime.errors import ConfigError, PluginError
from m3runtime.observe.counts import TierStats, exported
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

_FAMILIES: dict[str, type[CounterMetricFamily | GaugeMetricFamily]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
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
        for subject, counts in (("recall", metrics.recall), ("lookahead", metrics.lookahead), ("store", metrics.store)):
            for one in exported(counts):
                family = _family(subject, one)
                family.add_metric([], getattr(counts, one.name))
                yield family
        yield histogram("m3_recall_phase_seconds", "Phases of recalls.", "phase", metrics.recall_phases)
        yield histogram("m3_lookahead_phase_seconds", "Background work, by phase.", "phase", metrics.lookahead_phases)
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
    for one in exported(TierStats):
        family = _family("tier", one, labels=["tier"])
        for tier in metrics.tiers:
            family.add_metric([tier.stats.name], getattr(tier.stats, one.name))
        yield family
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
    yield histogram("m3_tier_read_seconds", "Calls that read from the tier.", "tier", reads)


def _family(subject: str, one: Field[Any], labels: Sequence[str] = ()) -> CounterMetricFamily | GaugeMetricFamily:
    """A metric family without samples for a field of counts; ``..._s`` becomes ``..._seconds``."""
    name = re.sub("_s$", "_seconds", one.name)
    return _FAMILIES[one.metadata["type"]](f"m3_{subject}_{name}", one.metadata["text"], labels=labels)


def histogram(name: str, text: str, label: str, latencies: Mapping[str, Latency]) -> HistogramMetricFamily:
    """A histogram family of latencies by the value of a label."""
    family = HistogramMetricFamily(name, text, labels=[label])
    bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
    for key, latency in latencies.items():
        buckets = list(zip(bounds, map(float, accumulate(latency.buckets)), strict=True))
        family.add_metric([key], buckets, latency.sum_s)
    return family
