"""``m3 top``: the metrics of a running process, live."""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Set, configuration
from m3runtime.cli.terminal import console, print_json, printable
from m3runtime.errors import InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from rich.console import Group

    from m3runtime.config.schema import MetricsConfig

DEFAULT_PORT = 9464


@dataclass(frozen=True, slots=True)
class Sample:
    """The metrics of an endpoint at one time."""

    at: float
    values: Mapping[str, float]
    """Metrics without labels, by name without ``m3_`` and ``_total``."""
    by_label: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Metrics with one label (tier or phase), by name and label, without the buckets of latencies."""


def top(
    config: ConfigFile = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port. Default: `metrics.port`, or 9464.")] = None,
    address: Annotated[str | None, typer.Option(help="Address. Default: `metrics.address`, or 127.0.0.1.")] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two samples.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one sample, and exit.")] = False,
    set: Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print one sample as JSON, and exit.")] = False,
) -> None:
    """Watch the recalls of a running process that was started with `metrics.port` set."""
    configured = _configured(config, set)
    where = f"{address or configured.address}:{port or configured.port or DEFAULT_PORT}"
    sample = read(where)
    if json:
        print_json({**sample.values, **sample.by_label})
        return
    from rich.live import Live

    screen = console()
    if once:
        screen.print(shown(where, sample, None))
        return
    # Ctrl-C is how it ends.
    with suppress(KeyboardInterrupt), Live(shown(where, sample, None), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            before, sample = sample, read(where)
            live.update(shown(where, sample, before), refresh=True)


def _configured(file: Path | None, settings: list[str] | None) -> "MetricsConfig":
    """The section ``metrics`` of the configuration, or its defaults if there is no configuration."""
    from m3runtime.config.schema import MetricsConfig

    if file is None and not settings and "M3_CONFIG" not in os.environ and not Path("m3.yaml").exists():
        return MetricsConfig()
    return configuration(file, settings).metrics


def read(where: str) -> Sample:
    """Read an endpoint. Raises `InputError` if nothing listens there, or it is not a runtime."""
    import urllib.error  # not with the module: every command imports that
    import urllib.request
    from http.client import HTTPException

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{where}/metrics", timeout=5) as answer:
            text = printable(answer.read(1 << 22).decode("utf-8", "replace"))  # names in it reach the terminal
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are subclasses
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise InputError(f"nothing answers at {where} ({reason}); {_hint(where)}") from error
    sample = parse(text)
    if "recall_chunks" not in sample.values:
        raise InputError(f"the process at {where} is not a runtime of m3")
    return sample


def _hint(where: str) -> str:
    """How a process comes to answer there."""
    port = where.rpartition(":")[2]
    if find_spec("prometheus_client") is None:
        return (
            f"first pip install 'm3runtime[metrics]', then start a process, such as `m3 chat`, with metrics.port={port}"
        )
    return (
        f"only a running process answers: start `m3 chat --set metrics.port={port}` in another terminal, or your "
        f"program with M3_METRICS__PORT={port}; --port watches another port"
    )


def parse(text: str) -> Sample:
    """The metrics of a runtime in Prometheus' text format."""
    values: dict[str, float] = {}
    by_label: dict[str, dict[str, float]] = defaultdict(dict)
    for line in text.splitlines():
        head, _, number = line.rpartition(" ")
        name, brace, labels = head.partition("{")
        if not name.startswith("m3_") or name.endswith(("_bucket", "_created")):
            continue
        name = name.removeprefix("m3_").removesuffix("_total")
        try:
            value = float(number)
        except ValueError:
            continue
        if brace:
            by_label[name][labels.partition('"')[2].rpartition('"')[0]] = value
        else:
            values[name] = value
    return Sample(time.monotonic(), values, dict(by_label))


def shown(where: str, now: Sample, before: Sample | None) -> "Group":
    """A sample as tables. Rates are since ``before``, or since the process started."""
    from rich.console import Group
    from rich.text import Text

    values = defaultdict(float, now.values)
    rate = ""
    if before is not None and now.at > before.at:
        chunks = values["recall_chunks"] - before.values.get("recall_chunks", 0)
        rate = f" ({chunks / (now.at - before.at):.1f}/s)"
    guesses = values["lookahead_guesses"]
    lines = [
        f"m3 at {where}",
        f"chunks {values['recall_chunks']:.0f}{rate}   memories {values['recall_memories']:.0f}, "
        f"{_share(values['recall_kept'], values['recall_memories'])} kept   late {values['recall_late']:.0f}   "
        f"encoded {values['recall_encoded']:.0f}   "
        f"waited {values['recall_waited_seconds']:.2f} s",
        f"hints {values['lookahead_hints']:.0f}, {values['lookahead_cancelled']:.0f} overtaken   "
        f"guesses {guesses:.0f}, {_share(values['lookahead_hits'], guesses)} right, "
        f"{values['lookahead_beyond']:.0f} only lifted   failed {values['lookahead_failed']:.0f}",
        f"store {show_size(values['store_bytes'])} of {show_size(values['store_capacity'])}, "
        f"{values['store_parts']:.0f} parts, {values['store_leased']:.0f} leased, "
        f"{values['store_guessed']:.0f} guessed   "
        f"decoded {values['store_decoded']:.0f}   evicted {values['store_evicted']:.0f}   "
        f"wasted {show_size(values['store_wasted_bytes'])}",
    ]
    return Group(Text("\n".join(lines)), _tiers(now, before), _phases(now, before))


def _tiers(now: Sample, before: Sample | None) -> Any:
    from rich.table import Table

    table = Table("tier", "blocks", "of", "hit", "read", "lifted", "faults", "a read", box=None)
    for tier in now.by_label.get("tier_hits", {}):
        at = {name: of.get(tier, 0.0) for name, of in now.by_label.items() if name.startswith("tier_")}
        capacity = now.by_label.get("tier_capacity_bytes", {}).get(tier)
        table.add_row(
            tier,
            f"{at['tier_blocks']:.0f}" if tier in now.by_label.get("tier_blocks", {}) else "",
            "" if capacity is None else show_size(capacity),
            _share(at["tier_hits"], at["tier_hits"] + at["tier_misses"]),
            show_size(at["tier_bytes"]),
            f"{at['tier_lifted']:.0f}",
            f"{at['tier_faults']:.0f}",
            _mean("tier_read_seconds", tier, now, before),
        )
    return table


def _phases(now: Sample, before: Sample | None) -> Any:
    from rich.table import Table

    table = Table("phase", "in recalls", "each", "in background", "each", box=None)
    recall, background = "recall_phase_seconds", "lookahead_phase_seconds"
    counts = [now.by_label.get(f"{name}_count", {}) for name in (recall, background)]
    for phase in dict.fromkeys([*counts[0], *counts[1]]):
        table.add_row(
            phase,
            f"{counts[0].get(phase, 0):.0f}",
            _mean(recall, phase, now, before),
            f"{counts[1].get(phase, 0):.0f}",
            _mean(background, phase, now, before),
        )
    return table


def _mean(name: str, label: str, now: Sample, before: Sample | None) -> str:
    """The mean of the calls since ``before``, or of all calls if there were none."""

    def of(sample: Sample | None, what: str) -> float:
        return 0.0 if sample is None else sample.by_label.get(f"{name}_{what}", {}).get(label, 0.0)

    since = before if before is not None and of(now, "count") > of(before, "count") else None
    count = of(now, "count") - of(since, "count")
    return f"{(of(now, 'sum') - of(since, 'sum')) / count * 1000:.2f} ms" if count > 0 else ""


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
