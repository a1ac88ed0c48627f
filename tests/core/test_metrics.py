import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from m3runtime.cli import app, top
from m3runtime.errors import ConfigError, InputError
from m3runtime.observe.latency import BOUNDS_S, Timer
from m3runtime.observe.metrics import RECALL_PHASES, Timeline
from m3runtime.observe.prometheus import Collector, Endpoint, serve
from m3runtime.runtime import Runtime
from m3runtime.testing.threads import together
from tests.core.recalling import TEXTS, open_runtime


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with open_runtime(tmp_path / "bank", sections={"metrics": {"timeline": 100}}) as runtime:
        yield runtime


def use(runtime: Runtime) -> None:
    """Two chunks: one guessed rightly, one not at all."""
    with runtime.stream() as stream:
        stream.hint(TEXTS[3])
        runtime.background.drain()
        stream.recall(TEXTS[3])
        stream.recall(TEXTS[20])


def test_latencies_count_every_call_in_one_place() -> None:
    timer = Timer()
    seconds = [0.0, 1e-5, 1.1e-5, 0.5, 99.0]
    together(4, lambda _: [timer.add(value) for value in seconds] and None)
    latency = timer.latency()
    assert latency.count == sum(latency.buckets) == 20
    assert latency.sum_s == pytest.approx(4 * sum(seconds))
    assert latency.mean_s == pytest.approx(sum(seconds) / 5)
    assert latency.max_s == 99
    place = {bound: count for bound, count in zip(BOUNDS_S, latency.buckets, strict=False) if count}
    assert place == {1e-5: 8, 3e-5: 4, 1.0: 4}
    assert latency.buckets[-1] == 4
    assert Timer().latency().mean_s == 0


def test_phases_of_recalls_and_of_what_is_done_beside(runtime: Runtime) -> None:
    use(runtime)
    metrics = runtime.metrics()
    counted = {phase: latency.count for phase, latency in metrics.recall_phases.items()}
    brought = {"encode": 0, "wait": 0, "read": 1, "decode": 1}
    # The first text was embedded beside, and is not embedded again: the phase only finds it.
    assert counted == {"embed": 2, "search": 2, "bring": 2, "deliver": 2, "recall": 2, **brought}
    beside = {phase: latency.count for phase, latency in metrics.lookahead_phases.items()}
    assert beside == {"embed": 1, "search": 1, "read": 1, "decode": 1, "lift": 0}
    whole = metrics.recall_phases["recall"].sum_s
    assert sum(metrics.recall_phases[phase].sum_s for phase in ("embed", "search", "bring", "deliver")) <= whole
    assert (metrics.recall.chunks, metrics.recall.memories, metrics.recall.late) == (2, 6, 0)
    assert [tier.stats.name for tier in metrics.tiers] == ["pinned", "lmdb"]
    assert [tier.read.count for tier in metrics.tiers] == [2, 2]
    assert metrics.tiers[1].blocks == len(TEXTS)
    assert metrics.tiers[1].capacity is None


def test_what_was_recalled_says_how_long_its_phases_took(runtime: Runtime) -> None:
    with runtime.stream() as stream:
        recalled = stream.recall(TEXTS[3])
    assert set(recalled.phases) == {"embed", "search", "bring", "read", "decode", "deliver", "recall"}
    assert set(recalled.phases) <= set(RECALL_PHASES)
    assert all(seconds >= 0 for seconds in recalled.phases.values())
    assert recalled == replace(recalled, phases={})  # how long it took is not what it is


def test_a_timeline_has_who_did_what_when(runtime: Runtime) -> None:
    use(runtime)
    events = runtime.timeline()
    names = [event.name for event in events]
    assert names.count("recall") == 2
    assert names.count("ahead.decode") == 3
    assert all(event.start <= event.end and event.streams == (1,) for event in events)
    assert {event.thread for event in events if event.name == "recall"} == {threading.current_thread().name}
    assert all(event.thread.startswith("m3-ahead") for event in events if event.name.startswith("ahead."))
    assert {event.blocks for event in events if event.name == "ahead.read"} == {3}
    ahead = max(event.end for event in events if event.name == "ahead.decode")
    assert ahead <= min(event.start for event in events if event.name == "recall")
    runtime.meter.timeline.note("step", 1.0, 2.0, (7,))
    assert runtime.timeline()[-1].name == "step"


def test_a_timeline_is_bounded_and_off_by_default(tmp_path: Path) -> None:
    timeline = Timeline(3)
    for number in range(5):
        timeline.note(str(number), 0.0, 1.0)
    assert [event.name for event in timeline.events()] == ["2", "3", "4"]
    with open_runtime(tmp_path / "bank") as runtime:
        use(runtime)
        assert runtime.timeline() == ()


# -- Prometheus -------------------------------------------------------------------------------------------------------


def test_prometheus_reads_what_the_values_say(runtime: Runtime) -> None:
    use(runtime)
    registry = CollectorRegistry()
    registry.register(Collector(runtime.metrics))
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    metrics = runtime.metrics()

    def value(name: str, **labels: str) -> float:
        return next(
            sample.value
            for family in families.values()
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        )

    assert value("m3_recall_chunks_total") == 2
    assert value("m3_lookahead_hits_total") == metrics.lookahead.hits == 3
    assert value("m3_tier_misses_total", tier="pinned") == metrics.tiers[0].stats.misses
    assert value("m3_recall_phase_seconds_count", phase="decode") == 1
    assert value("m3_recall_phase_seconds_bucket", phase="recall", le="+Inf") == 2
    buckets = [
        sample.value
        for sample in families["m3_recall_phase_seconds"].samples
        if sample.name.endswith("_bucket") and sample.labels["phase"] == "recall"
    ]
    assert buckets == sorted(buckets)
    assert len(buckets) == len(BOUNDS_S) + 1


def test_every_number_is_exported(runtime: Runtime) -> None:
    metrics = runtime.metrics()
    found = {family.name for family in Collector(runtime.metrics).collect()}
    subjects = {"recall": metrics.recall, "lookahead": metrics.lookahead, "store": metrics.store}
    for subject, counts in {**subjects, "tier": metrics.tiers[0].stats}.items():
        numbers = {name for name, value in asdict(counts).items() if not isinstance(value, str)}
        assert {f"m3_{subject}_{name.replace('_s', '_seconds')}" for name in numbers} <= found


# -- m3 top -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(runtime: Runtime) -> Iterator[Endpoint]:
    with Endpoint(runtime.metrics, "127.0.0.1", 0) as endpoint:
        yield endpoint


def test_top_shows_a_running_process(
    runtime: Runtime, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use(runtime)
    runner = CliRunner()
    once = runner.invoke(app, ["top", "--once", "--port", str(endpoint.port)])
    assert once.exit_code == 0, once.output
    assert "chunks 2" in once.output
    assert "guesses 3, 100 % right" in once.output
    assert "lmdb" in once.output
    assert "decode" in once.output
    values = json.loads(runner.invoke(app, ["top", "--json", "--port", str(endpoint.port)]).output)
    assert values["recall_chunks"] == 2
    assert values["tier_hits"]["lmdb"] == runtime.metrics().tiers[1].stats.hits
    assert values["recall_phase_seconds_count"]["recall"] == 2


def test_top_finds_the_configured_port(
    runtime: Runtime, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"bank: b\nmodel: {{path: x}}\nembedder: {{path: x}}\nmetrics: {{port: {endpoint.port}}}\n"
    Path("m3.yaml").write_text(text)
    assert json.loads(CliRunner().invoke(app, ["top", "--json"]).output)["recall_chunks"] == 0


def test_rates_are_those_since_the_last_reading(runtime: Runtime, endpoint: Endpoint) -> None:
    where = f"127.0.0.1:{endpoint.port}"
    use(runtime)
    before = top.read(where)
    use(runtime)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(top.shown(where, top.read(where), before))
    assert "chunks 4 (" in shown.get()
    with console.capture() as shown:
        console.print(top.shown(where, before, None))
    assert "chunks 2   " in shown.get()


def test_one_line_where_nobody_listens_or_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=f"nothing answers at 127.0.0.1:{port} .*--port") as caught:
        top.read(f"127.0.0.1:{port}")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="nothing answers at no host:1"):
        top.read("no host:1")

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"m3_nothing of ours\nother 1\n")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(InputError, match="is not a runtime of m3"):
            top.read(f"127.0.0.1:{server.server_port}")
        thread.join()


def test_a_port_that_is_taken_is_named(runtime: Runtime, endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.port: cannot listen at 127\.0\.0\.1:{endpoint.port}"):
        Endpoint(runtime.metrics, "127.0.0.1", endpoint.port)


def test_a_second_process_of_one_configuration_goes_unwatched(
    runtime: Runtime, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    assert serve(runtime.metrics, "127.0.0.1", endpoint.port) is None
    assert "nobody can watch this process" in caplog.text
    with pytest.raises(ConfigError, match="cannot listen at no host:1"):
        serve(runtime.metrics, "no host", 1)


def test_a_closed_runtime_still_answers(runtime: Runtime, endpoint: Endpoint) -> None:
    use(runtime)
    runtime.close()
    sample = top.read(f"127.0.0.1:{endpoint.port}")
    assert sample.values["recall_chunks"] == 2
    assert "tier_blocks" not in sample.by_label
    endpoint.close()
    endpoint.close()
