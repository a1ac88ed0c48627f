"""``/v1/observe``: what the runtime does now, as JSON: counts, tiers, latencies and the timeline of recalls."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from m3runtime.observe.latency import Latency
from m3runtime.observe.metrics import TierMetrics
from m3runtime.serve.served import Served

_SHOWN = 400
"""Most events of the timeline."""


def router(served: Served) -> APIRouter:
    """The route of the observation."""
    routes = APIRouter(prefix="/v1", tags=["observe"])
    runtime = served.runtime

    @routes.get("/observe")
    def observe() -> dict[str, Any]:
        """Counts since the server began, and the last events; times of events are in seconds before now."""
        metrics, now = runtime.metrics(), time.perf_counter()
        return {
            "object": "observation",
            "model": served.name,
            "prompt": served.config.generate.prompt,
            "memories": len(runtime.bank.home),
            "recall": {**asdict(metrics.recall), "phases": _phases(metrics.recall_phases)},
            "lookahead": {
                **{name: value for name, value in asdict(metrics.lookahead).items() if name != "last_error"},
                "phases": _phases(metrics.lookahead_phases),
            },
            "store": asdict(metrics.store),
            "tiers": [_tier(one) for one in metrics.tiers],
            "has_timeline": runtime.meter.timeline.on,
            "timeline": [
                {
                    "name": event.name,
                    "began": round(now - event.start, 6),
                    "ended": round(now - event.end, 6),
                    "streams": event.streams,
                    "blocks": event.blocks,
                }
                for event in runtime.timeline()[-_SHOWN:]
            ],
        }

    return routes


def _phases(phases: Mapping[str, Latency]) -> dict[str, Any]:
    return {name: _latency(one) for name, one in phases.items()}


def _latency(one: Latency) -> dict[str, Any]:
    return {"count": one.count, "mean_s": one.mean_s, "max_s": one.max_s}


def _tier(tier: TierMetrics) -> dict[str, Any]:
    return {**asdict(tier.stats), "blocks": tier.blocks, "capacity": tier.capacity, "read": _latency(tier.read)}
