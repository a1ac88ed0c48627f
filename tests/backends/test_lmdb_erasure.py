"""What a compacted LMDB home leaves on its drive, by the bytes of its files."""

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from m3backends.lmdb import compaction
from m3backends.lmdb.compression import ENOUGH
from m3backends.lmdb.home import LmdbHome
from m3backends.lmdb.structure import structure_problems
from m3runtime.errors import BankError, BankFullError
from m3runtime.storage.home import Batch, Changes
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_blocks, make_ids
from m3runtime.testing.home import check_whole, contents
from m3runtime.testing.home_contents import digest
from m3runtime.testing.home_erasure import left, make_secrets, pieces
from m3runtime.testing.process import OtherProcess
from m3runtime.testing.tier import check_read
from tests.backends.lmdb_contract import LmdbContract
from tests.forked import run


def damage(home: LmdbHome) -> list[str]:
    """All but that the embeddings of tests are no unit vectors."""
    return [one.what for one in home.audit() if one.where != "embedding"]


class Erasure(RuleBasedStateMachine):
    """A home that is compacted has all that it holds, and its files nothing of what it held before."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.held: dict[int, Batch] = {}
        """The batch of one of each id that is remembered."""
        self.cold: set[int] = set()
        self.gone: list[bytes] = []
        self.compacted = False
        self.open()

    def open(self) -> None:
        self.home = LmdbHome(path=self.folder / "home", slot_bytes=SLOT_BYTES, durability="relaxed")

    def new(self, count: int) -> Batch:
        first = self.home.next_id()
        return make_secrets(range(first, first + count))

    def hold(self, batch: Batch) -> None:
        self.compacted = False
        for row in range(len(batch.ids)):
            one = slice(row, row + 1)
            part = Batch(batch.ids[one], batch.blocks[one], batch.references[one], batch.embeddings[one])
            self.held[int(batch.ids[row])] = part

    def drop(self, ids: list[int]) -> None:
        self.compacted = False
        for id in ids:
            self.gone += pieces(self.held.pop(id))
            self.cold.discard(id)

    @rule(count=st.integers(1, 12))
    def commit(self, count: int) -> None:
        batch = self.new(count)
        self.home.commit(batch)
        self.hold(batch)

    @rule(count=st.integers(1, 12))
    def catalogue(self, count: int) -> None:
        batch = self.new(count)
        self.home.catalogue(batch.ids, batch.references, batch.embeddings)
        self.hold(batch)
        self.cold |= set(batch.ids.tolist())

    @precondition(lambda self: self.cold)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        ids = make_ids(*data.draw(st.lists(st.sampled_from(sorted(self.cold)), min_size=1, unique=True)))
        self.home.fill(ids, make_blocks(ids))
        self.cold -= set(ids.tolist())
        self.compacted = False

    @precondition(lambda self: self.held)
    @rule(data=st.data(), replaced=st.booleans())
    def forget(self, data: st.DataObject, replaced: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        if replaced:
            batch = self.new(2)
            self.home.commit(batch, replacing=make_ids(*ids))
            self.hold(batch)
        elif len(ids) % 2:
            self.home.discard(make_ids(*ids))
        else:
            self.home.change(Changes(dict.fromkeys(ids, ())))
        self.drop(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        self.home.quarantine(data.draw(st.sampled_from(sorted(self.held))), "rotten")
        self.compacted = False

    @rule(size=st.integers(0, 9000))
    def set_meta(self, size: int) -> None:
        self.home.set_meta("manifest", b"m" * size)

    @rule()
    def reopen(self) -> None:
        self.home.close()
        self.open()

    @rule()
    def compact(self) -> None:
        before = contents(self.home)
        self.home.compact()
        assert contents(self.home) == before
        self.compacted = True

    @invariant()
    def holds_what_was_not_forgotten(self) -> None:
        apart = self.home.quarantined().keys()
        assert self.home.ids().tolist() == sorted(self.held.keys() - apart)
        ids = make_ids(*self.held)
        assert self.home.references(ids) == [one.references[0] for one in self.held.values()]
        found = check_read(self.home, ids)
        assert found.tolist() == [id not in apart and id not in self.cold for id in self.held]

    @invariant()
    def files_have_nothing_of_what_was_forgotten(self) -> None:
        if self.compacted:
            assert not left(self.folder, self.gone)

    def teardown(self) -> None:
        self.home.compact()
        self.home.close()
        assert not left(self.folder, self.gone)
        assert structure_problems(self.folder / "home" / "data.mdb") == []
        shutil.rmtree(self.folder)


TestErasure = Erasure.TestCase
TestErasure.settings = settings(max_examples=12, stateful_step_count=15)


def test_bytes_of_the_forgotten_are_there_before(tmp_path: Path) -> None:
    """Or the others could not fail."""
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_secrets(range(6)))
        home.discard(make_ids(1, 2))
        assert left(tmp_path, pieces(make_secrets([1, 2])))


def test_a_dictionary_of_zstd_has_no_part_of_a_forgotten_block(tmp_path: Path) -> None:
    """It is made of parts of blocks, so it is made anew, of blocks that are left."""

    def batch(ids: range) -> Batch:
        made = make_batch(ids, 4096)
        for row, id in enumerate(ids):
            common, own = np.random.default_rng(0), np.random.default_rng([id, 1])
            content = np.tile(common.integers(0, 256, 500, np.uint8), 8)
            content[own.integers(0, 4000, 300)] = own.integers(0, 256, 300, np.uint8)
            made.blocks[row, 48 + 64 : 3900] = torch.from_numpy(content)[: 3900 - 112]
        return made

    with LmdbHome(path=tmp_path, slot_bytes=4096, compression="zstd") as home:
        home.commit(batch(range(2 * ENOUGH)))
        for kept in (ENOUGH + 3, 5):
            assert home._packing is not None
            assert home._packing.method == "dictionary"
            dictionary, blocks = home._packing.dictionary, [bytes(block) for block in contents(home)["blocks"]]
            parts = [dictionary[at : at + 10] for at in range(len(dictionary) - 10)]
            of_gone, of_kept = b"\n".join(blocks[:-kept]), b"\n".join(blocks[-kept:])
            parts = [part for part in parts if part in of_gone and part not in of_kept and len({*part}) > 7]
            assert left(tmp_path, parts)
            home.discard(home.ids()[:-kept])
            home.compact()
            assert not left(tmp_path, parts)
            assert [bytes(block) for block in contents(home)["blocks"]] == blocks[-kept:]
        assert home._packing is None  # there are too few to decide
        home.commit(batch(range(home.next_id(), home.next_id() + ENOUGH)))
        assert home._packing is not None
        assert not damage(home)
    with LmdbHome(path=tmp_path, compression="zstd") as home:
        assert [bytes(block) for block in contents(home)["blocks"]][:5] == blocks[-5:]


KILLED = """
import os, signal, sys
from m3backends.lmdb import compaction, environment
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_ids

step, calls = int(sys.argv[2]), 0

def watch(frame, event, _):
    global calls
    if event in ("call", "c_call"):
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)

with LmdbHome(path=sys.argv[1]) as home:
    compaction._PIECE = 4096
    sys.setprofile(watch)
    home.compact()
    sys.setprofile(None)
print(calls)
"""


def check_killed(tmp_path: Path, moments: Callable[[int], list[int]]) -> None:
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_secrets(range(30)))
        home.discard(make_ids(*range(0, 30, 3)))
        before = contents(home)
    gone = pieces(make_secrets(range(0, 30, 3)))
    shutil.copytree(tmp_path / "home", tmp_path / "whole")
    done = run(KILLED, tmp_path / "whole", 0)
    assert done.returncode == 0, done.stdout
    outcomes = set[bool]()
    for moment in moments(int(done.stdout)):
        place = tmp_path / str(moment)
        shutil.copytree(tmp_path / "home", place)
        killed = run(KILLED, place, moment)
        assert killed.returncode == -signal.SIGKILL, killed.stdout
        with LmdbHome(path=place, read_only=True) as reader:
            assert contents(reader) == before
        outcomes.add(bool(left(place, gone)))
        with LmdbHome(path=place) as home:
            assert not list(place.glob(".*.tmp"))  # what it left takes no room
            assert contents(home) == before
            assert not damage(home)
            home.compact()
            assert not left(place, gone)
            home.commit(make_batch([50]))
            check_whole(home, make_ids(50))
    assert outcomes == {True, False}


def test_killed_while_compacting(tmp_path: Path) -> None:
    check_killed(tmp_path, lambda end: [end // 2, end - 3])


@pytest.mark.slow
def test_killed_at_every_step_of_compacting(tmp_path: Path) -> None:
    check_killed(tmp_path, lambda end: sorted({*range(1, end, max(1, end // 60)), *range(end - 60, end)}))


def test_readers_of_both_files_and_a_writer(tmp_path: Path) -> None:
    """Each process sees every commit, whichever file it opened, though all share LMDB's table of readers."""
    place = tmp_path / "home"
    with (
        OtherProcess(LmdbReading) as early,
        OtherProcess(LmdbReading) as late,
        LmdbHome(path=place, slot_bytes=SLOT_BYTES) as home,
    ):
        home.commit(make_batch(range(6)))
        assert early.ask("open", str(place), read_only=True) == {}
        home.compact()
        assert late.ask("open", str(place), read_only=True) == {}
        for turn in range(10, 13):
            home.commit(make_batch([turn]))
            for reader in (late, early, late):
                assert reader.ask("look") == {"contents": digest(home)}
            home.compact()


class LmdbReading(LmdbContract):
    def open(self, folder: Path, *, read_only: bool = False) -> LmdbHome:
        return LmdbHome(path=folder, read_only=read_only)


@pytest.mark.parametrize("turns", [0, 1, 200])
def test_the_number_of_the_last_transaction_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """Also where a home was written in fewer transactions than it is copied in."""
    monkeypatch.setattr(compaction, "_PIECE", 1)
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(9)))
        for turn in range(turns):
            home.set_meta("turn", b"%d" % turn)
        before, number = contents(home), home._environment.env.info()["last_txnid"]
        home.compact()
        after = home._environment.env.info()["last_txnid"]
        assert after == number if turns == 200 else after >= number
        assert contents(home) == before
        home.set_meta("turn", b"last")
        assert home._environment.env.info()["last_txnid"] == after + 1
        assert contents(home) == before
    assert structure_problems(tmp_path / "data.mdb") == []
    with LmdbHome(path=tmp_path) as home:
        assert home.get_meta("turn") == b"last"
        assert not damage(home)


def test_a_linked_file_is_compacted_where_it_lies(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_secrets(range(6)))
    (tmp_path / "drive").mkdir()
    moved = tmp_path / "drive" / "moved.mdb"
    (tmp_path / "home" / "data.mdb").rename(moved)
    (tmp_path / "home" / "data.mdb").symlink_to(moved)
    moved.chmod(0o640)
    with LmdbHome(path=tmp_path / "home") as home:
        home.discard(make_ids(1, 2))
        before = contents(home)
        home.compact()
        assert contents(home) == before
    assert (tmp_path / "home" / "data.mdb").readlink() == moved
    assert moved.stat().st_mode & 0o777 == 0o640
    assert not left(tmp_path, pieces(make_secrets([1, 2])))


@pytest.mark.parametrize("fault", ["no room", "broken"])
def test_what_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device") if fault == "no room" else lmdb.CorruptedError("broken")

    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_secrets(range(6)))
        before = contents(home)
        with monkeypatch.context() as patched:
            patched.setattr(compaction, "set_last_transaction", fail)
            expected = (BankFullError, "no room for a second copy") if fault == "no room" else (Exception, "broken")
            with pytest.raises(expected[0], match=expected[1]):
                home.compact()
        assert not list(tmp_path.glob(".*.tmp"))
        assert contents(home) == before
        home.commit(make_batch([50]))
        home.compact()
        check_whole(home, make_ids(50))


def test_a_reader_refuses_another_bank_in_its_place(tmp_path: Path) -> None:
    for name, size in (("one", 2 * SLOT_BYTES), ("other", SLOT_BYTES)):
        LmdbHome(path=tmp_path / name, slot_bytes=size).close()
    with LmdbHome(path=tmp_path / "one", read_only=True) as home:
        (tmp_path / "other" / "data.mdb").replace(tmp_path / "one" / "data.mdb")
        with pytest.raises(BankError, match="another bank took its place"):
            home.ids()
