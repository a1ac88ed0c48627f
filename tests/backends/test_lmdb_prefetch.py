"""What `Prefetch` asks the drive for is exactly the pages of the blocks that LMDB reads next."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from m3backends.lmdb.home import LmdbHome
from m3backends.lmdb.prefetch import DENSE, MOST, Prefetch
from m3backends.lmdb.records import pack_ids
from m3runtime.memory.block import Ids
from m3runtime.testing.blocks import make_batch, make_blocks, make_ids, stored_bytes
from m3runtime.testing.tier import check_read

SLOT = 9000
"""Blocks of up to nine thousand bytes: some lie in a leaf, most behind it."""
PAGE = 4096

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked for pages")


class Noting(Prefetch):
    """Notes the extents instead of asking for them."""

    def _ask(self, file: int, extents: Iterable[tuple[int, int]]) -> None:
        self.asked = [*getattr(self, "asked", []), *extents]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[LmdbHome]:
    with LmdbHome(path=tmp_path / "bank", slot_bytes=SLOT, durability="relaxed") as home:
        for start in range(0, 700, 50):  # the tree of the blocks has branches
            home.commit(make_batch(range(start, start + 50), SLOT))
        yield home


def asked(home: LmdbHome, database: bytes, ids: Ids, kind: type[Noting] = Noting) -> list[bytes]:
    """The content of the extents that are asked for."""
    data = home.path / "data.mdb"
    noting = kind(data, PAGE)
    try:
        home._environment.read(lambda txn: noting.fetch(txn, database, pack_ids(ids)))
        content = data.read_bytes()
        return [content[number * PAGE : number * PAGE + length] for number, length in getattr(noting, "asked", [])]
    finally:
        noting.close()


def test_all_of_each_block_is_asked_for(home: LmdbHome) -> None:
    for ids in np.random.default_rng(0).choice(700, (20, 32)).astype(np.uint64):
        extents = asked(home, b"blocks", ids)
        for block in map(stored_bytes, make_blocks(ids, SLOT)):
            assert any(block in extent for extent in extents) or len(block) < PAGE // 2
        assert sum(map(len, extents)) < sum(SLOT + 2 * PAGE for _ in ids)


def test_what_is_not_there_is_not_asked_for(home: LmdbHome) -> None:
    assert asked(home, b"blocks", make_ids(5000)) == []
    assert asked(home, b"blocks", make_ids()) == []
    assert asked(home, b"no such database", make_ids(1)) == []
    assert asked(home, b"cold", make_ids(1)) == []  # an empty one


def test_a_scan_is_left_to_the_kernel(home: LmdbHome) -> None:
    assert asked(home, b"blocks", make_ids(*range(0, 10 * MOST, 10)))
    assert asked(home, b"blocks", make_ids(*range(0, 10 * MOST + 10, 10))) == []
    assert asked(home, b"blocks", make_ids(*range(DENSE - 1)))
    assert asked(home, b"blocks", make_ids(*range(DENSE))) == []


def test_damaged_pages_are_left_to_lmdb(home: LmdbHome, tmp_path: Path) -> None:
    """Whatever the file holds, no error and no endless loop comes of asking."""
    size = (home.path / "data.mdb").stat().st_size
    for seed in range(30):
        random = np.random.default_rng(seed)
        noise = random.integers(0, 256, size, np.uint8)
        noise[::PAGE] = 0
        other = tmp_path / "noise"
        other.write_bytes(noise[: random.integers(0, size)].tobytes())
        noting = Noting(other, PAGE)
        home._environment.read(lambda txn, noting=noting: noting.fetch(txn, b"blocks", pack_ids(make_ids(1, 2, 699))))
        noting.close()


def test_reads_what_was_dropped_from_memory(home: LmdbHome) -> None:
    file = os.open(home.path / "data.mdb", os.O_RDONLY)
    try:
        for ids in np.random.default_rng(1).choice(800, (20, 5)).astype(np.uint64):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert np.array_equal(check_read(home, ids), ids < 700)
            assert [one is not None for one in home.references(ids)] == (ids < 700).tolist()
    finally:
        os.close(file)
