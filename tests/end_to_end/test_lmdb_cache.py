"""What was forgotten never comes back from a cache on a drive, and `--erase` leaves no byte there."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from m3backends.lmdb.cache import LmdbCache
from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery

COUNT = 8
GONE = {2, 5}


@pytest.fixture
def place(tmp_path: Path, new_place: NewPlace) -> Place:
    """A bank, and a cache that holds all of it."""
    place = new_place(tmp_path / "place")
    cache = {"kind": "m3backends.lmdb.cache:LmdbCache", "capacity": "1MiB", "path": str(place.folder / "cache")}
    place.configure(memory={"layers": [0]}, tiers=[cache, {"kind": "lmdb"}])
    place.text("corpus.jsonl", records(f"Keeper {n} lit it on day {n * 37}." for n in range(COUNT)))
    assert place.m3("write", "corpus.jsonl", "--json").json["written"] == COUNT
    with opened(place) as runtime:
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
        assert len(cache_of(runtime)) == COUNT
    return place


def opened(place: Place) -> Runtime:
    return Runtime.open(Config.load(place.file, environ={}), read_only=True)


def cache_of(runtime: Runtime) -> LmdbCache:
    tier = runtime.hierarchy.tiers[0]
    assert isinstance(tier, LmdbCache)
    return tier


def blocks(place: Place, ids: set[int]) -> list[bytes]:
    """Parts of the payloads of blocks, as the home has them."""
    with opened(place) as runtime:
        rows = torch.zeros(len(ids), runtime.bank.slot_bytes, dtype=torch.uint8)
        assert runtime.bank.home.read(np.array(sorted(ids), np.uint64), rows).all()
        return [row.numpy()[64 + at : 80 + at].tobytes() for row in rows for at in range(0, 64, 16)]


def left(place: Place, parts: list[bytes]) -> bool:
    content = b"".join(path.read_bytes() for path in (place.folder / "cache").iterdir())
    return any(part in content for part in parts)


def test_what_is_kept_answers_in_the_next_process(place: Place) -> None:
    with opened(place) as runtime:
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
        cache, home = runtime.hierarchy.stats()
        assert (cache.hits, home.hits) == (COUNT, 0)


def test_forgetting_erases_it_while_nobody_has_it_open(place: Place) -> None:
    parts = blocks(place, GONE)
    assert left(place, parts)
    assert place.m3("forget", *map(str, sorted(GONE)), "--erase").code == 0
    assert not left(place, parts)
    with opened(place) as runtime:
        assert set(cache_of(runtime).ids().tolist()) == set(range(COUNT)) - GONE


def test_a_process_that_has_it_open_erases_it_when_it_refreshes(place: Place, nursery: Nursery) -> None:
    parts = blocks(place, GONE)
    with opened(place) as runtime:
        forgotten = nursery.m3(place, "forget", *map(str, sorted(GONE)))
        assert forgotten.code == 0
        assert "tier lmdb-cache failed: what it still holds is discarded when it is used again" in forgotten.err
        runtime.refresh()
        assert set(cache_of(runtime).ids().tolist()) == set(range(COUNT)) - GONE
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT - len(GONE)
        assert not left(place, parts)


def test_what_the_home_forgot_without_the_cache_is_discarded_when_it_is_opened(place: Place) -> None:
    parts = blocks(place, GONE)
    assert place.m3("forget", *map(str, sorted(GONE)), "--set", "tiers=[{kind: lmdb}]").code == 0
    assert left(place, parts)
    with opened(place) as runtime:
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT - len(GONE)
        assert not left(place, parts)


def test_a_runtime_whose_cache_another_process_has_answers_from_the_home(place: Place) -> None:
    with LmdbCache(slot_bytes=64, capacity=64, path=place.folder / "cache") as other, opened(place) as runtime:
        assert not len(other)
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
        cache, home = runtime.hierarchy.stats()
        assert cache.faults
        assert home.hits == COUNT
        other.close()
        runtime.hierarchy.read(
            np.arange(COUNT, dtype=np.uint64), torch.zeros(COUNT, runtime.hierarchy.slot_bytes).byte()
        )
        assert len(cache_of(runtime)) == COUNT


def test_another_bank_with_the_same_settings_gets_nothing_of_it(place: Place) -> None:
    """Ids begin anew at 0, and equal settings give blocks equal stamps: only the identity tells them apart."""
    shutil.rmtree(place.bank)
    place.text("corpus.jsonl", records(f"Sailor {n} saw it on day {n * 41}." for n in range(COUNT)))
    assert place.m3("write", "corpus.jsonl", "--json").json["written"] == COUNT
    with opened(place) as runtime:
        assert not len(cache_of(runtime))
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
        cache, home = runtime.hierarchy.stats()
        assert (cache.hits, home.hits) == (0, COUNT)
