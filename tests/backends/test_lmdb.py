import os
import shutil
import struct
import threading
from dataclasses import replace
from pathlib import Path
from random import Random

import lmdb
import numpy as np
import pytest
import torch

from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import (
    BankError,
    BankFormatError,
    BankFullError,
    BankMismatchError,
    BankMissingError,
    BlockError,
    InputError,
    TierError,
)
from m3runtime.memory.block import check
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids
from m3runtime.testing.home import check_whole, contents
from tests.backends.lmdb_contract import LmdbContract
from tests.forked import run

BIG = 1 << 20


class TestLmdbHome(LmdbContract):
    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        return LmdbHome(path=folder, slot_bytes=SLOT_BYTES, read_only=read_only)


def raw(path: Path, database: str, key: bytes, value: bytes | None) -> None:
    """Change a record of a closed home behind its back."""
    with lmdb.open(str(path), max_dbs=16, map_size=1 << 30) as env:
        db = env.open_db(database.encode(), create=False)
        with env.begin(write=True, db=db) as txn:
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)


def stored(path: Path, id: int) -> bytes:
    """The bytes of a block in a closed home."""
    with lmdb.open(str(path), max_dbs=16) as env:
        db = env.open_db(b"blocks", create=False)
        with env.begin(db=db) as txn:
            value = txn.get(id.to_bytes(8, "big"))
    assert value is not None
    return value


def test_stores_exactly_the_block(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(5)))
    for id in range(5):
        block = make_blocks(make_ids(id))[0].numpy()
        assert stored(tmp_path, id) == block[: check(block, id=id, stamp=STAMP)].tobytes()


def test_slot_bytes_come_from_the_bank(tmp_path: Path) -> None:
    with pytest.raises(BankMissingError, match="no bank"):
        LmdbHome(path=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    LmdbHome(path=tmp_path / "bank", slot_bytes=SLOT_BYTES).close()
    for read_only in (False, True):
        with LmdbHome(path=tmp_path / "bank", read_only=read_only) as home:
            assert home.slot_bytes == SLOT_BYTES
    with pytest.raises(BankMismatchError, match="slots of 256 bytes, not 512"):
        LmdbHome(path=tmp_path / "bank", slot_bytes=512)
    LmdbHome(path=tmp_path / "bank").close()  # a refused opening leaves nothing open


@pytest.mark.parametrize("content", [b"", b"he", b"hello" * 4000, bytes(range(256)) * 32], ids=len)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_foreign_file(tmp_path: Path, content: bytes, read_only: bool) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(BankError) as caught:
        LmdbHome(path=tmp_path, read_only=read_only)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "bank").write_text("not a bank")
    with pytest.raises(BankError, match="is not the folder of a bank"):
        LmdbHome(path=tmp_path / "bank", slot_bytes=SLOT_BYTES)


def test_an_environment_of_another_program(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2) as env:
        env.open_db(b"theirs")
    for read_only in (False, True):
        with pytest.raises(BankError, match="belongs to another program"):
            LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES, read_only=read_only)


def test_a_newer_format(tmp_path: Path) -> None:
    LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES).close()
    raw(tmp_path, "home", b"version", b"4")
    with pytest.raises(
        BankFormatError, match="LMDB home has schema 4, this release reads 3; install a newer m3runtime"
    ):
        LmdbHome(path=tmp_path)


def test_an_older_format(tmp_path: Path) -> None:
    LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES).close()
    raw(tmp_path, "home", b"version", b"1")
    raw(tmp_path, "home", b"slot_bytes", b"%d" % SLOT_BYTES)
    with pytest.raises(BankFormatError, match="LMDB home has schema 1, this release reads 3; write the bank anew"):
        LmdbHome(path=tmp_path)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_bank_without_its_databases(tmp_path: Path, read_only: bool) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2) as env:
        env.open_db(b"home")
    with pytest.raises(BankError, match="is damaged"):
        LmdbHome(path=tmp_path, read_only=read_only)


@pytest.mark.parametrize("value", [b"", b"many"])
def test_a_bank_whose_slots_are_no_number(tmp_path: Path, value: bytes) -> None:
    LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES).close()
    raw(tmp_path, "home", b"slot_bytes", value)
    with pytest.raises(BankError, match="is damaged"):
        LmdbHome(path=tmp_path)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_cut_off_is_refused_and_does_not_kill(tmp_path: Path, read_only: bool) -> None:
    with LmdbHome(path=tmp_path / "whole", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(200)))
    size = (tmp_path / "whole" / "data.mdb").stat().st_size
    for pages in range(2, size // 4096, 3):
        shutil.copytree(tmp_path / "whole", tmp_path / "cut", dirs_exist_ok=True)
        os.truncate(tmp_path / "cut" / "data.mdb", pages * 4096 + 100)
        with pytest.raises(BankError, match="is damaged"):
            LmdbHome(path=tmp_path / "cut", read_only=read_only)


def test_pages_that_lmdb_never_wrote_are_no_damage(tmp_path: Path) -> None:
    """LMDB may leave the last pages of a whole file unwritten, if they are free."""
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(20)))
        before = contents(home)
    random, keys = Random(0), list[bytes]()
    with lmdb.open(str(tmp_path), max_dbs=16, map_size=1 << 26) as env:
        meta = env.open_db(b"meta", create=False)
        for _ in range(1000):
            with env.begin(write=True, db=meta) as txn:
                for _ in range(random.randrange(1, 60)):
                    if random.random() < 0.5 or not keys:
                        keys.append(random.randbytes(8))
                        txn.put(keys[-1], random.randbytes(random.choice([8, 400, 1500, 9000])))
                    else:
                        txn.delete(keys.pop(random.randrange(len(keys))))
            in_use = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            if short := in_use > (tmp_path / "data.mdb").stat().st_size:
                break
    assert short
    for read_only in (True, False):
        with LmdbHome(path=tmp_path, read_only=read_only) as home:
            assert contents(home) == before
    assert (tmp_path / "data.mdb").stat().st_size == in_use


def test_a_home_leaves_no_page_unwritten(tmp_path: Path) -> None:
    """So that opening it need not walk over all its pages to know that nothing was cut off."""
    for seed in range(8):
        random, folder = Random(seed), tmp_path / str(seed)
        with LmdbHome(path=folder, slot_bytes=SLOT_BYTES) as home:
            home.commit(make_batch(range(50)))
            while len(home):
                ids = home.ids().tolist()
                home.discard(np.array(random.sample(ids, len(ids) // 2 + 1), np.uint64))
                env = home._environment.env
                in_use = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                assert (folder / "data.mdb").stat().st_size >= in_use


@pytest.mark.parametrize(
    "damage",
    [
        lambda block: b"",
        lambda block: block[:20],
        lambda block: block[:-1],
        lambda block: block + b"\0" * 1000,
        lambda block: block[:32] + struct.pack("<I", 2**32 - 1) + block[36:],
        lambda block: block[:-1] + bytes([block[-1] ^ 1]),
        lambda block: make_blocks(make_ids(99))[0].numpy().tobytes(),
    ],
)
def test_a_damaged_record_is_never_taken_for_its_block(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([1, 2, 3]))
    block = stored(tmp_path, 2)
    raw(tmp_path, "blocks", (2).to_bytes(8, "big"), damage(block))
    with LmdbHome(path=tmp_path) as home:
        # What an earlier reading left in the row must not complete what is missing.
        out = make_blocks(make_ids(1, 2, 3))
        found = home.read(make_ids(1, 2, 3), out)
        assert found.all()
        assert check(out[0].numpy(), id=1, stamp=STAMP)
        assert check(out[2].numpy(), id=3, stamp=STAMP)
        if damage(block)[: len(block)] == block:  # only longer: the block itself is whole
            assert check(out[1].numpy(), id=2, stamp=STAMP) == len(block)
        else:
            with pytest.raises(BlockError):
                check(out[1].numpy(), id=2, stamp=STAMP)


def test_a_damaged_reference_is_a_typed_error(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([1]))
    raw(tmp_path, "references", (1).to_bytes(8, "big"), b'["\xff')
    with LmdbHome(path=tmp_path) as home, pytest.raises(TierError, match="damaged"):
        home.references(make_ids(1))


def test_the_map_grows(tmp_path: Path) -> None:
    """One batch larger than the first map, then many small ones, then a thread that reads all the while."""
    with LmdbHome(path=tmp_path, slot_bytes=BIG) as home:
        home.commit(make_batch(range(100), BIG))
        assert home.stored_bytes() > 0
        stop = threading.Event()
        wrong: list[str] = []

        def read() -> None:
            out = torch.zeros((3, BIG), dtype=torch.uint8)
            made = make_blocks(make_ids(0, 50, 99), BIG)
            while not stop.is_set():
                if not home.read(make_ids(0, 50, 99), out).all() or len(home) < 100:
                    wrong.append("missed")
                for row, id in enumerate((0, 50, 99)):
                    end = check(out[row].numpy(), id=id, stamp=STAMP)
                    if not torch.equal(out[row, :end], made[row, :end]):
                        wrong.append("other bytes")

        reader = threading.Thread(target=read)
        reader.start()
        for first in range(100, 200, 10):
            home.commit(make_batch(range(first, first + 10), BIG))
        stop.set()
        reader.join()
        assert wrong == []
        assert home.stored_bytes() > 64 << 20
    with LmdbHome(path=tmp_path, read_only=True) as home:
        check_whole(home, make_ids(0, 99, 199))


def fill(home: Home, first: int) -> int:
    """Commit single blocks until the home is full; the first id that was not taken."""
    while True:
        assert home.next_id() == first
        try:
            home.commit(make_batch([first], BIG))
        except BankFullError:
            assert home.next_id() == first
            return first
        first += 1


def test_a_full_bank_says_so_and_keeps_its_limit(tmp_path: Path) -> None:
    limit = 8 << 20
    with LmdbHome(path=tmp_path, slot_bytes=BIG, max_size=limit) as home:
        end = fill(home, 0)
        assert end >= 10  # blocks have half a slot on average
        before = contents(home)
        with pytest.raises(
            BankFullError, match="its limit of 8MiB is reached; raise `max_size` of the lmdb tier or forget"
        ):
            home.commit(make_batch(range(end, end + 20), BIG))
        assert contents(home) == before
        check_whole(home, make_ids(*range(end)))
        assert home.stored_bytes() <= limit
    with LmdbHome(path=tmp_path, max_size=2 * limit) as home:
        home.commit(make_batch(range(end, end + 4), BIG))
        check_whole(home, make_ids(*range(end + 4)))


def test_a_full_bank_has_room_again_after_forgetting(tmp_path: Path) -> None:
    limit = 8 << 20
    with LmdbHome(path=tmp_path, slot_bytes=BIG, max_size=limit) as home:
        end = fill(home, 0)
        for _ in range(6):
            home.set_meta("cursor", os.urandom(100))
            home.discard(home.ids()[::2])
            start = end
            end = fill(home, end)
            assert end > start
            assert home.stored_bytes() <= limit
        check_whole(home, home.ids())


def test_replacing_in_a_full_bank_is_refused_whole_and_works_after_forgetting(tmp_path: Path) -> None:
    """Both are there until the transaction ends, so there must be room for both."""
    limit = 8 << 20
    with LmdbHome(path=tmp_path, slot_bytes=BIG, max_size=limit) as home:
        end = fill(home, 0)
        before = contents(home)
        old = make_ids(*range(end))
        batch = replace(make_batch(range(end, 2 * end), BIG), references=home.references(old))
        with pytest.raises(BankFullError, match="its limit of 8MiB is reached"):
            home.commit(batch, replacing=old)
        assert contents(home) == before
        assert home.stored_bytes() <= limit
        home.discard(old[: end // 2 + 1])
        rest = old[end // 2 + 1 :]
        few = replace(make_batch([end], BIG), references=home.references(rest[:1]))
        home.commit(few, replacing=rest[:1])
        assert home.ids().tolist() == [*rest[1:].tolist(), end]
        assert home.find([few.references[0].text]) == [end]
        assert {one.where for one in home.audit()} == {"embedding"}  # these are not of length 1
        assert home.stored_bytes() <= limit


def test_a_limit_too_small_for_anything(tmp_path: Path) -> None:
    with pytest.raises(BankFullError, match="its limit of 16KiB is reached"):
        LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES, max_size=16 << 10)


FULL_DRIVE = """
import resource, sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import BankFullError
from m3runtime.testing.blocks import make_batch, make_ids
from m3runtime.testing.home import check_whole, contents

home = LmdbHome(path=sys.argv[1], slot_bytes=1 << 20)
home.commit(make_batch([0], 1 << 20))
# Writing beyond this fails as it does on a full drive: first a short write, then an error.
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
end = 1
while True:
    before = contents(home)
    try:
        home.commit(make_batch([end], 1 << 20))
    except BankFullError as error:
        assert "its drive has no room left" in str(error), error
        break
    end += 1
assert contents(home) == before
home.discard(make_ids(0))
home.discard(make_ids(1))
check_whole(home, home.ids())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(end)
"""


def test_a_full_drive(tmp_path: Path) -> None:
    done = run(FULL_DRIVE, tmp_path)
    assert done.returncode == 0, done.stdout
    with LmdbHome(path=tmp_path) as home:
        check_whole(home, make_ids(*range(2, int(done.stdout))))
        home.commit(make_batch(range(1000, 1008), BIG))


OTHER_PROCESS = """
import sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_batch

with LmdbHome(path=sys.argv[1], slot_bytes=1 << 20) as home:
    home.commit(make_batch(range(home.next_id(), home.next_id() + 150), 1 << 20))
"""


def test_another_process_grows_it(tmp_path: Path) -> None:
    LmdbHome(path=tmp_path, slot_bytes=BIG).close()
    with LmdbHome(path=tmp_path, read_only=True) as home:
        assert len(home) == 0
        assert run(OTHER_PROCESS, tmp_path).returncode == 0
        assert home.stored_bytes() > 64 << 20
        check_whole(home, make_ids(0, 75, 149))


def test_closing_waits_for_those_who_read(tmp_path: Path) -> None:
    home = LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES)
    home.commit(make_batch(range(50)))
    ids = make_ids(*range(50))
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while True:
                check_whole(home, ids)
        except TierError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    home.close()
    for thread in threads:
        thread.join()
    assert [str(error) for error in errors] == [f"bank {tmp_path} is closed"] * 3


def test_write_takes_blocks_that_have_no_reference(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.write(make_ids(3), make_blocks(make_ids(3)))
        assert home.next_id() == 4
        assert home.ids().tolist() == []
        with pytest.raises(InputError):
            home.commit(make_batch([3]))
        home.discard(make_ids(3))
        assert len(home) == 0


def test_wider_slots_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([0, 1]))
        home.widen(3 * SLOT_BYTES)
    for read_only in (False, True):
        with LmdbHome(path=tmp_path, read_only=read_only) as again:
            assert again.slot_bytes == 3 * SLOT_BYTES
    with pytest.raises(BankMismatchError, match=f"slots of {3 * SLOT_BYTES} bytes, not {SLOT_BYTES}"):
        LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES)
