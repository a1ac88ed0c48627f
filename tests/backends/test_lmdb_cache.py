"""`LmdbCache`: the contract, and what becomes of it when processes and files are damaged."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest

from m3backends.lmdb.cache import LmdbCache
from m3runtime.errors import BlockError, ConfigError, TierError
from m3runtime.memory.block import check
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_blocks, make_ids, same_block
from m3runtime.testing.persistent import PersistentTierContract
from m3runtime.testing.tier import check_read, read, write


def opened(path: Path, slots: int = 16, slot_bytes: int = SLOT_BYTES) -> LmdbCache:
    return LmdbCache(slot_bytes=slot_bytes, capacity=slots * slot_bytes, path=path)


class TestLmdbCache(PersistentTierContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return LmdbCache(slot_bytes=slot_bytes, capacity=capacity, path=self.folder / "cache")

    def reopen(self, tier: CachingTier, *, capacity: int) -> CachingTier:
        """A killed process leaves its files; only its lock is gone."""
        assert isinstance(tier, LmdbCache)
        path = tier.path
        if tier._file is not None:
            path = tier.path.with_name(f"{tier.path.name}-again")
            shutil.copytree(tier.path, path)
        return LmdbCache(slot_bytes=tier.slot_bytes, capacity=capacity, path=path)

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        assert isinstance(tier, LmdbCache)
        file = tier._file
        assert file is not None
        assert file._table is not None
        with file._table.env.begin(db=file._database) as txn:
            slots = [int.from_bytes(key, "big") for key, value in txn.cursor() if value == id.to_bytes(8, "big")]
        if not slots:
            return None
        with (tier.path / "blocks").open("rb") as blocks:
            blocks.seek(slots[0] * tier.slot_bytes)
            return blocks.read(tier.slot_bytes)

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        assert isinstance(tier, LmdbCache)
        file = tier._file
        assert file is not None
        assert file._table is not None
        slot = tier._held[id] if id in tier._held else tier._free.pop()
        with (tier.path / "blocks").open("r+b") as blocks:
            blocks.seek(slot * tier.slot_bytes)
            blocks.write(block.ljust(tier.slot_bytes, b"\0"))
        with file._table.env.begin(write=True, db=file._database) as txn:
            txn.put(slot.to_bytes(8, "big"), id.to_bytes(8, "big"))
        if id not in tier._held:
            tier._held[id] = slot
            tier._policy.admitted(id)


def test_the_file_of_blocks_is_as_long_as_the_capacity(tmp_path: Path) -> None:
    with opened(tmp_path / "cache", 10) as tier:
        for start in range(0, 100, 7):
            write(tier, make_ids(*range(start, start + 7)))
            assert (tmp_path / "cache" / "blocks").stat().st_size <= tier.capacity
        assert (tmp_path / "cache" / "blocks").stat().st_size == tier.capacity


def test_a_second_process_goes_on_without_until_the_first_has_closed(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "cache"), opened(tmp_path / "cache")  # locks are of open files
    write(first, make_ids(1))
    for call in (lambda: write(second, make_ids(2)), second.ids, lambda: read(second, make_ids(1))):
        with pytest.raises(TierError, match="open in another process"):
            call()
    first.close()
    assert second.ids().tolist() == [1]
    assert check_read(second, make_ids(1)).all()
    second.close()


@pytest.mark.parametrize("others", ["data.mdb", "notes.txt"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, others: str) -> None:
    (tmp_path / others).write_bytes(b"mine")
    with pytest.raises(ConfigError, match="no cache"):
        opened(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(others, b"mine")]


def test_slots_of_another_size_are_begun_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as tier:
        write(tier, make_ids(1, 2))
    with opened(tmp_path / "cache", slot_bytes=SLOT_BYTES + 1) as tier:
        assert not len(tier)
        write(tier, make_ids(3))
        assert check_read(tier, make_ids(1, 2, 3)).tolist() == [False, False, True]


def _cut(file: Path, random: Random) -> None:
    os.truncate(file, random.randrange(file.stat().st_size))


def _flip(file: Path, random: Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(40):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def _noise(file: Path, random: Random) -> None:
    file.write_bytes(random.randbytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [_cut, _flip, _noise])
@pytest.mark.parametrize("name", ["data.mdb", "blocks", "lmdb-cache", "verified"])
def test_what_was_damaged_is_begun_anew_or_fails_its_check(
    tmp_path: Path, name: str, damage: Callable[[Path, Random], None]
) -> None:
    everything = make_ids(*range(30))
    for seed in range(3):
        path = tmp_path / str(seed)
        with opened(path) as tier:
            write(tier, make_ids(*range(16)))
        damage(path / name, Random(seed))
        for _ in range(2):
            with opened(path) as tier:
                try:
                    found, out = read(tier, everything)
                except TierError:
                    found = np.zeros(30, np.bool_)
                for row in np.flatnonzero(found).tolist():
                    with suppress(BlockError):  # or it is right
                        check(out[row].numpy(), id=row, stamp=STAMP)
                        assert same_block(out[row], make_blocks(everything)[row])
                tier.discard(everything)
                write(tier, everything[-16:])
                assert check_read(tier, everything).sum() == 16


_WRITER = """
import sys
from pathlib import Path
from random import Random
from m3backends.lmdb.cache import LmdbCache
from m3runtime.testing.blocks import SLOT_BYTES, make_ids
from m3runtime.testing.tier import write
random = Random(int(sys.argv[2]))
tier = LmdbCache(slot_bytes=SLOT_BYTES, capacity=16 * SLOT_BYTES, path=Path(sys.argv[1]))
print("open", flush=True)
while True:
    write(tier, make_ids(*(random.randrange(60) for _ in range(5))))
    tier.discard(make_ids(random.randrange(60)))
    print("went on", flush=True)
"""


def _kill_writers(path: Path, times: int) -> None:
    for seed in range(times):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(seed)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        for _ in range(Random(seed).randrange(40)):
            assert writer.stdout.readline() == b"went on\n"
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with opened(path) as tier:
            held = tier.ids()
            assert check_read(tier, held).all()  # right bytes, of the right ids
            assert len(tier) == len(set(held.tolist())) <= 16


def test_a_writer_that_is_killed_leaves_right_blocks(tmp_path: Path) -> None:
    _kill_writers(tmp_path / "cache", 1)


@pytest.mark.kill
def test_fifty_writers_that_are_killed_leave_right_blocks(tmp_path: Path) -> None:
    _kill_writers(tmp_path / "cache", 50)
