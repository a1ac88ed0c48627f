"""Memories that are damaged, or forgotten by another process, are read by no worker; each worker has its own cache."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3model.adapter import TransformersAdapter
from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm

BAD, GONE, WHOLE = 4, 3, 5
M3 = "from m3runtime.cli import main; main()"


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"tensor_parallel_size": 3, "slots": 253, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def file(config: Config, adapter: TransformersAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a copy of the bank in which one block has a flipped bit."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(config.bank, folder / "bank")
    with raw.records(Place(folder), "blocks") as (txn, _):
        block = txn.get(raw.key_of(BAD))
        assert block is not None
        txn.put(raw.key_of(BAD), raw.flip(bytes(block), 8 * 900))
    file = folder / "m3.yaml"
    file.write_text(json.dumps(config.model_copy(update={"bank": folder / "bank"}).model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def runtime(file: Path) -> Iterator[Runtime]:
    with Runtime.open(file, read_only=True) as runtime:
        yield runtime


def ask(both: Both, *ids: int, tokens: int = 8, **more: Any) -> Ask:
    return Ask(both.prompt("What does the harbour lamp burn?"), tokens, (ids,) if ids else None, more=(*more.items(),))


def test_a_damaged_block_ends_the_request_that_names_it(both: Both) -> None:
    [before] = both.theirs([ask(both, WHOLE)])
    bad, fine = both.theirs([ask(both, GONE, BAD), ask(both, WHOLE)])
    assert bad.error
    assert not bad.tokens
    assert fine.tokens == before.tokens


def test_a_forgotten_memory_is_read_from_no_cache(both: Both, file: Path) -> None:
    """The workers have it rotated, vLLM has it in its prefix cache, and a request that reads it goes on meanwhile."""
    [before] = both.theirs([ask(both, GONE, tokens=90)])
    assert not before.error
    running = both.submit(both.ids(ask(both, GONE, tokens=90)), 90, {"m3": ask(both, GONE).wish})
    for _ in range(5):
        both.step()
    subprocess.run([sys.executable, "-c", M3, "forget", str(GONE), "--config", str(file)], check=True, timeout=120)
    named = ask(both, GONE)
    bad = both.submit(both.ids(named), 8, {"m3": named.wish})
    with_others = ask(both, WHOLE, GONE)
    worse = both.submit(both.ids(with_others), 8, {"m3": with_others.wish})
    one, other, went_on = both.wait([bad, worse, running])
    assert one.error
    assert other.error
    assert not one.tokens
    assert not other.tokens
    assert not went_on.error
    assert went_on.tokens == before.tokens
    both.runtime.refresh()
    [found] = both.theirs([ask(both)])
    assert GONE not in [memory["id"] for memory in found.m3["reads"][0]["memories"]]
