"""A home that is open for writing keeps only a part of its file in the process's memory."""

import mmap
from pathlib import Path

import pytest
import torch

from m3backends.lmdb import reader, residency
from m3backends.lmdb.environment import Environment
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_blocks, make_ids
from m3runtime.testing.home import check_whole
from m3runtime.testing.threads import together

STATM = Path("/proc/self/statm")
SLOT = 1 << 20
BOUND = 16 << 20
"""Bytes of the file that may come into memory."""


def mapped() -> int:
    """Bytes of mapped files in this process's memory."""
    return int(STATM.read_text().split()[2]) * mmap.PAGESIZE


@pytest.mark.skipif(not STATM.exists(), reason="the system does not tell what is in memory")
def test_the_pages_of_a_home_that_is_written_leave_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "MOST", BOUND)
    out, most = torch.zeros(1, SLOT, dtype=torch.uint8), 0
    with LmdbHome(path=tmp_path, slot_bytes=SLOT, durability="relaxed") as home:
        before = mapped()
        for id in range(8 * BOUND // SLOT):
            home.write(make_ids(id), make_blocks(make_ids(id), SLOT))
        for id in range(8 * BOUND // SLOT):
            assert home.read(make_ids(id), out).all()
            most = max(most, mapped() - before)
        assert home.stored_bytes() > 3 * BOUND
    assert most < BOUND + 4 * SLOT


def test_threads_read_while_the_file_is_mapped_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "MOST", -1)  # after every call
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(20)))

        def work(number: int) -> None:
            for turn in range(20):
                if number:
                    check_whole(home, make_ids(*range(20)))
                else:
                    home.commit(make_batch([20 + turn]))

        together(4, work)
        check_whole(home, make_ids(*range(40)))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7])
def test_ids_are_listed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(reader, "_PART", 3)
    ids = [2**64 - 1 - 5 * id for id in reversed(range(count))]
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(ids))
        assert home.ids().tolist() == ids
        if count:
            home.quarantine(ids[-1], "rotten")
            assert home.ids().tolist() == ids[:-1]


@pytest.mark.parametrize("commits", [1, 2, 1000])
def test_ids_are_those_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Each commit, which comes between two parts, replaces all references."""
    monkeypatch.setattr(reader, "_PART", 3)
    read, left = Environment.read, commits

    def read_and_commit(environment, work):  # type: ignore[no-untyped-def]
        nonlocal left
        result = read(environment, work)
        if left:
            left, first = left - 1, 7 * (commits - left + 1)
            home.commit(make_batch(range(first, first + 7)), replacing=make_ids(*range(first - 7, first)))
        return result

    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(7)))
        with monkeypatch.context() as patched:
            patched.setattr(Environment, "read", read_and_commit)
            found = home.ids().tolist()
        assert found in [list(range(first, first + 7)) for first in range(0, home.next_id(), 7)]
