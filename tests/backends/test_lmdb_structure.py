"""LMDB is given no file that could crash it: what is not known to be as it was left is verified first."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from m3backends.lmdb import claim as lmdb_claim
from m3backends.lmdb import files as lmdb_files
from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.home import LmdbHome
from m3backends.lmdb.structure import check_structure, structure_problems
from m3runtime.errors import BankError
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_ids
from m3runtime.testing.home import check_whole
from tests.forked import run

PAGE = 4096
NEVER_CLOSED = """
import os, sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_batch

home = LmdbHome(path=sys.argv[1])
home.commit(make_batch(range(home.next_id(), home.next_id() + 3)))
os._exit(0)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed home."""
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(60)))
    return tmp_path / "home"


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are stamped with their content as small ones are, or without it."""
    if request.param == "large":
        monkeypatch.setattr(lmdb_files, "SMALL", 0)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose structure was verified since."""
    seen: list[Path] = []

    def check(data: Path) -> None:
        seen.append(data)
        check_structure(data)

    monkeypatch.setattr(lmdb_claim, "check_structure", check)
    return seen


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_is_verified_once_and_again_only_when_it_is_not_as_it_was_left(
    path: Path, verified: list[Path], read_only: bool
) -> None:
    data = path / "data.mdb"

    def reopen() -> int:
        verified.clear()
        with LmdbHome(path=path, read_only=read_only) as home:
            check_whole(home, make_ids(0, 59))
        return len(verified)

    assert reopen() == 0
    assert run(NEVER_CLOSED, path).returncode == 0
    assert [reopen(), reopen()] == [1, 0]
    for spoil in (
        lambda: os.utime(data),
        lambda: shutil.copy2(shutil.move(data, path / "was"), data),  # other inode, same times
        lambda: (path / "verified").unlink(),
        lambda: (path / "verified").write_text("1 2 3 0\n"),
        lambda: (path / "verified").write_bytes((path / "verified").read_bytes()[:-3]),
    ):
        spoil()
        assert [reopen(), reopen()] == [1, 0]


def test_a_bit_that_rots_in_a_small_file_is_found(path: Path) -> None:
    """Time, size and inode stay: LMDB would look for the root of a database far beyond the file's end."""
    before = (path / "data.mdb").stat()
    with (path / "data.mdb").open("r+b") as file:
        for page in (0, 1):
            file.seek(page * 4096 + 16 + 24 + 48 + 44)
            file.write(b"\x01")
    os.utime(path / "data.mdb", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not HomeFiles(path).is_verified()
    for read_only in (True, False):
        with pytest.raises(BankError, match="is damaged"):
            LmdbHome(path=path, read_only=read_only)


def test_what_writes_withdraws_the_statement_that_the_file_is_whole(path: Path, verified: list[Path]) -> None:
    with LmdbHome(path=path) as home:
        assert (path / "verified").exists()
        home.set_meta("a", b"1")
        assert not (path / "verified").exists()
    assert HomeFiles(path).is_verified()
    assert verified == []


def test_a_reader_beside_a_writer_trusts_what_the_writer_verified(path: Path, verified: list[Path]) -> None:
    with LmdbHome(path=path) as home:
        home.commit(make_batch([100]))
        reading = (
            "import sys; from m3backends.lmdb import home; print(len(home.LmdbHome(path=sys.argv[1], read_only=True)))"
        )
        done = run(reading, path)
        assert (done.stdout, done.returncode) == ("61\n", 0)
        assert not (path / "verified").exists()
    assert verified == []


@pytest.mark.parametrize("place", ["verified", "data.mdb", "lock.mdb", "writer.lock", "opening.lock"])
@pytest.mark.parametrize("read_only", [True, False])
def test_pipes_folders_and_links_are_not_followed(path: Path, place: str, read_only: bool) -> None:
    """Each ends in an error or does no harm; none is waited for, and nothing is written where a link points."""
    victim = path.parent / "victim"
    makers: list[Callable[[Path], object]] = [
        os.mkfifo,
        Path.mkdir,
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to(path.parent / "nowhere"),
        lambda file: file.symlink_to(victim),
    ]
    for make in makers:
        copy = path.parent / "copy"
        shutil.copytree(path, copy)
        (copy / "verified").unlink()
        (copy / place).unlink(missing_ok=True)
        victim.write_bytes(b"of somebody")
        make(copy / place)
        refused = ""
        try:
            with LmdbHome(path=copy, read_only=read_only) as home:
                check_whole(home, make_ids(0, 59))
        except BankError as error:
            refused = str(error)
        if place == "data.mdb" or refused:
            assert place != "verified"
            assert str(copy) in refused
            assert "\n" not in refused
        assert victim.read_bytes() == b"of somebody"
        assert not (path.parent / "nowhere").exists()
        shutil.rmtree(copy)


@pytest.mark.parametrize("read_only", [True, False])
def test_the_data_may_lie_on_another_drive(path: Path, tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "drive").mkdir()
    shutil.move(path / "data.mdb", tmp_path / "drive" / "data.mdb")
    (path / "data.mdb").symlink_to(tmp_path / "drive" / "data.mdb")
    with LmdbHome(path=path, read_only=read_only) as home:
        check_whole(home, make_ids(0, 59))
        if not read_only:
            home.commit(make_batch([60]))
    with LmdbHome(path=path) as home:
        check_whole(home, make_ids(0, 59))


def meta(data: Path, number: int, offset: int, value: bytes) -> None:
    """Write into a meta page, after its header of 16 bytes."""
    with data.open("r+b") as file:
        file.seek(number * PAGE + 16 + offset)
        file.write(value)


MAP_SIZE, PAGE_SIZE, LAST_PAGE = 16, 24, 120


@pytest.mark.parametrize("last", [10**4 * 10, 2**20, 2**40, 2**62, 2**64 - 1])
def test_a_file_that_states_more_pages_than_it_can_have(path: Path, last: int) -> None:
    for number in (0, 1):
        meta(path / "data.mdb", number, LAST_PAGE, struct.pack("<Q", last))
    with pytest.raises(BankError, match="is damaged"):
        LmdbHome(path=path)


def test_a_file_of_holes_that_states_as_many_pages(path: Path) -> None:
    """To verify so many takes 2 bytes each, and to open them much room: what is on the drive does not justify it."""
    os.truncate(path / "data.mdb", 1 << 42)
    for number in (0, 1):
        meta(path / "data.mdb", number, LAST_PAGE, struct.pack("<Q", 2**30 - 1))
    with pytest.raises(BankError, match="it states 1073741824 pages"):
        LmdbHome(path=path)


def test_a_lie_about_the_map_is_not_believed(path: Path) -> None:
    for number in (0, 1):
        meta(path / "data.mdb", number, MAP_SIZE, struct.pack("<Q", 2**61))
    with LmdbHome(path=path) as home:
        check_whole(home, make_ids(0, 59))
        home.commit(make_batch(range(60, 70)))
    with LmdbHome(path=path, read_only=True) as home:
        check_whole(home, make_ids(0, 69))


@pytest.mark.parametrize("size", [0, 1, 255, 4095, 8192, 2**31, 2**32 - 1])
def test_pages_of_another_size(path: Path, size: int) -> None:
    for number in (0, 1):
        meta(path / "data.mdb", number, PAGE_SIZE, struct.pack("<I", size))
    with pytest.raises(BankError, match="is damaged"):
        LmdbHome(path=path)


HOSTILE = """
import os, sys
from random import Random
from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import M3Error
from m3runtime.testing.home import contents

path, random, outcomes = sys.argv[1], Random(0), {}
whole = open(path + "/data.mdb", "rb").read()
for turn in range(150):
    data = bytearray(whole)
    for _ in range(random.choice([1, 1, 5])):
        page = random.randrange(len(data) // 4096)
        at = 4096 * page + (random.randrange(4096) if turn % 2 else random.randrange(160))
        data[at] = random.randrange(256) if turn % 3 else data[at] ^ 1 << random.randrange(8)
    with open(path + "/data.mdb", "r+b") as file:
        file.write(data)
    try:
        with LmdbHome(path=path, read_only=turn % 2 == 0) as home:
            contents(home)
            list(home.audit())
            if turn % 2:
                home.discard(home.ids()[:3])
        outcome = "read"
    except M3Error as error:
        assert "\\n" not in str(error), error
        outcome = type(error).__name__
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(outcomes)
"""


def test_no_byte_of_a_file_makes_lmdb_crash(path: Path) -> None:
    done = run(HOSTILE, path)
    assert done.returncode == 0, done.stdout
    assert "BankError" in done.stdout
    assert "read" in done.stdout


def test_flipped_bits_of_pages_are_found_or_touch_nothing(path: Path) -> None:
    whole, random, found = (path / "data.mdb").read_bytes(), Random(1), 0
    for _ in range(200):
        data = bytearray(whole)
        data[random.randrange(len(data) // PAGE) * PAGE + random.randrange(24)] ^= 1 << random.randrange(8)
        (path / "data.mdb").write_bytes(data)
        found += bool(structure_problems(path / "data.mdb"))
    assert found > 100
