"""Processes around one LMDB home: one writes, any number read, and none crosses a fork."""

import os
import tempfile
from pathlib import Path

import pytest

from m3backends.lmdb.environment import Durability
from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import BankBusyError, BankError, ConfigError, TierError
from m3runtime.plugins.construction import construct
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_ids
from m3runtime.testing.cachestat import can_tell, unsynced_files
from m3runtime.testing.home import check_whole, contents
from tests.forked import Program

MODES: tuple[Durability, ...] = ("full", "commit", "relaxed")
WRITER = """
import sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_batch

home = LmdbHome(path=sys.argv[1], slot_bytes=256, durability=sys.argv[2])
for line in sys.stdin:
    home.commit(make_batch(range(home.next_id(), home.next_id() + 5)))
    print(home.next_id(), flush=True)
"""


def writer(path: Path, durability: Durability = "full") -> Program:
    """A process that commits five references for each line."""
    return Program(WRITER, path, durability)


def commit(process: Program) -> int:
    """Let it commit. Returns the id that follows."""
    return int(process.ask())


@pytest.mark.parametrize("durability", MODES)
def test_killing_the_writer_frees_the_home_and_loses_nothing(tmp_path: Path, durability: Durability) -> None:
    with writer(tmp_path, durability) as process:
        assert commit(process) == 5
        with pytest.raises(BankBusyError, match=r"open for writing already.*close it there, or open it for reading"):
            LmdbHome(path=tmp_path)
        with LmdbHome(path=tmp_path, read_only=True) as reader:
            check_whole(reader, make_ids(*range(5)))
            assert commit(process) == 10
            check_whole(reader, make_ids(*range(10)))
            process.kill()
            process.wait()
            check_whole(reader, make_ids(*range(10)))
    with LmdbHome(path=tmp_path) as home:
        check_whole(home, make_ids(*range(10)))
        home.commit(make_batch([10]))


def test_one_process_opens_it_once(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        with pytest.raises(BankBusyError, match="open for writing already"):
            LmdbHome(path=tmp_path)
        with pytest.raises(BankBusyError, match="already open in this process"):
            LmdbHome(path=tmp_path, read_only=True)
        home.commit(make_batch([1]))
    with LmdbHome(path=tmp_path, read_only=True), pytest.raises(BankBusyError, match="already open in this process"):
        LmdbHome(path=tmp_path, read_only=True)
    LmdbHome(path=tmp_path).close()  # a refused opening leaves nothing open


@pytest.mark.parametrize("durability", ["commit", "relaxed"])
def test_closing_puts_on_the_drive_what_was_committed(tmp_path: Path, durability: Durability) -> None:
    if not can_tell(tmp_path):
        pytest.skip("the kernel does not tell what is on the drive")
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES, durability=durability) as home:
        home.commit(make_batch(range(50)))
        assert unsynced_files(tmp_path / "home")  # or the test could not fail
    assert not unsynced_files(tmp_path / "home")


def test_durability_is_checked_like_any_option(tmp_path: Path) -> None:
    given = {"path": tmp_path, "slot_bytes": SLOT_BYTES}
    with construct(LmdbHome, {"durability": "relaxed"}, "tiers.0", **given) as home:
        home.commit(make_batch([1]))
    with pytest.raises(ConfigError, match=r"tiers.0.durability must be 'full', 'commit' or 'relaxed', not 'none'"):
        construct(LmdbHome, {"durability": "none"}, "tiers.0", **given)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_home_refuses_to_be_used_in_a_process_that_forked(tmp_path: Path, read_only: bool) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(5)))
    home = LmdbHome(path=tmp_path, read_only=read_only)
    before = contents(home)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            for use in (home.ids, lambda: home.commit(make_batch([9])), lambda: list(home.audit())):
                with pytest.raises(TierError, match="opened before this process forked; open it anew in this one"):
                    use()
            home.close()
            with LmdbHome(path=tmp_path, read_only=True) as own:
                said = str(len(own))
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "5"
    assert contents(home) == before
    if not read_only:
        home.commit(make_batch([9]))
        with writer(tmp_path) as process:  # what the child had is not the lock
            assert process.wait() != 0
    home.close()


AS_NOBODY = """
import os, sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import BankError
from m3runtime.testing.blocks import make_ids
from m3runtime.testing.home import check_whole

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    with LmdbHome(path=sys.argv[1], read_only=True) as home:
        check_whole(home, make_ids(0, 4))
        assert list(home.sources())
        print("read", flush=True)
        sys.stdin.readline()
except BankError as error:
    print(type(error).__name__, error)
"""


def nobody(path: Path) -> Program:
    """A process that may read the folder and not write to it."""
    return Program(AS_NOBODY, path)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_read_alone(tmp_path: Path) -> None:
    """LMDB cannot note such a reader, so no writer may change what it reads."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is for its user alone
        Path(name).chmod(0o755)
        read_alone(Path(name))


def read_alone(tmp_path: Path) -> None:
    home = LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES)
    home.commit(make_batch(range(5)))
    with nobody(tmp_path / "home") as process:
        assert process.stdout.readline().startswith("BankBusyError")
    home.close()
    files = sorted(file.name for file in (tmp_path / "home").iterdir())
    with nobody(tmp_path / "home") as process, nobody(tmp_path / "home") as another:
        for one in (process, another):
            assert one.stdout.readline() == "read\n"
        with pytest.raises(BankBusyError):
            LmdbHome(path=tmp_path / "home")
    assert sorted(file.name for file in (tmp_path / "home").iterdir()) == files
    (tmp_path / "home" / "verified").unlink()
    with nobody(tmp_path / "home") as process:
        assert process.stdout.readline() == "read\n"
        assert not (tmp_path / "home" / "verified").exists()
    with LmdbHome(path=tmp_path / "home") as home:
        home.commit(make_batch([9]))


def test_a_place_for_the_lock_that_cannot_be_locked(tmp_path: Path) -> None:
    LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES).close()
    (tmp_path / "writer.lock").unlink()
    (tmp_path / "writer.lock").mkdir()
    with pytest.raises(BankError, match=r"cannot be opened: .*writer.lock"):
        LmdbHome(path=tmp_path)
