"""The laws of a home's durability, and of other processes that read it."""

import shutil
from collections.abc import Callable, Iterator

import pytest

from m3runtime.documents.reference import Place
from m3runtime.documents.sources import SourceState
from m3runtime.errors import BankBusyError, BankMissingError, TierReadOnlyError
from m3runtime.storage.home import Changes, Home
from m3runtime.testing.blocks import make_batch, make_blocks, make_ids
from m3runtime.testing.cachestat import can_tell, unsynced_files
from m3runtime.testing.home_cold import catalogue
from m3runtime.testing.home_contents import check_whole, contents, digest
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.process import OtherProcess
from m3runtime.testing.tier import check_read, write

Change = Callable[[Home], object]
CHANGES: dict[str, Change] = {
    "opening": lambda home: None,  # noqa: ARG005
    "commit": lambda home: home.commit(make_batch([3, 0, 7, 8])),
    "write": lambda home: write(home, make_ids(20)),
    "quarantine": lambda home: home.quarantine(7, "rotten"),
    "discard": lambda home: home.discard(make_ids(0, 20)),
    "set_meta": lambda home: home.set_meta("manifest", b"\0\xff"),
    "replacing": lambda home: home.commit(make_batch([30, 31]), replacing=make_ids(3, 7)),
    "compact": lambda home: home.compact(),
    "last commit": lambda home: home.commit(make_batch([40])),
    "catalogue": lambda home: catalogue(home, make_ids(41, 42, 43)),
    "fill": lambda home: home.fill(make_ids(43, 41), make_blocks(make_ids(43, 41))),
    "change": lambda home: home.change(
        Changes({42: (Place("here", 0, 1), Place("there", 5, 6, {"page": "7"}))}, {"here": SourceState(1, 2, "3", "4")})
    ),
}
"""Every kind of change, one after the other."""


class DurabilityLaws(HomeLaws):
    """A finished call is durable: the next process and concurrent readers see its result."""

    @pytest.fixture
    def other(self) -> Iterator[OtherProcess]:
        """Another process, before it opened anything."""
        with OtherProcess(type(self)) as process:
            yield process

    def open_there(self, other: OtherProcess, *, read_only: bool) -> dict[str, str]:
        """Open the home in the other process. Returns its answer."""
        return other.ask("open", str(self.place), read_only=read_only)

    # Opened again

    @pytest.mark.parametrize("read_only", [False, True])
    def test_survives_closing(self, home: Home, read_only: bool) -> None:
        for change in CHANGES.values():
            change(home)
        home.quarantine(8, "rotten")
        before = contents(home)
        home.close()
        with self.open(self.place, read_only=read_only) as again:
            assert contents(again) == before
            assert again.get_meta("manifest") == b"\0\xff"
            assert again.quarantined() == {8: "rotten"}
            assert check_read(again, make_ids(0, 3, 7, 8, 20)).sum() == 0
            check_whole(again, make_ids(30, 31, 40, 41, 43))
            assert again.cold().tolist() == [42]

    def test_a_copy_of_its_files_holds_what_was_committed(self, home: Home) -> None:
        """A copy between two calls is the state that a killed process leaves."""
        if not self.of_files:
            pytest.skip("this home is not made of files")
        for name, change in CHANGES.items():
            change(home)
            copy = self.folder / f"after {name}"
            shutil.copytree(self.place, copy)
            with self.open(copy) as copied:
                assert contents(copied) == contents(home), f"the files do not hold the {name}"

    def test_is_on_the_drive_when_the_call_returns(self, home: Home) -> None:
        """No page waits in the page cache, to be lost in a power cut."""
        if not self.of_files or not can_tell(self.folder):
            pytest.skip("neither files nor kernel tell what is on the drive")
        for name, change in CHANGES.items():
            change(home)
            unsynced = unsynced_files(self.place)
            assert not unsynced, f"after {name}: pages that are not on the drive"

    # Opened for reading only

    def test_reading_only(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))
        catalogue(home, make_ids(3))
        before = contents(home)
        home.close()
        with self.open(self.place, read_only=True) as again:
            assert contents(again) == before
            check_whole(again, make_ids(1, 2))
            changes: tuple[Callable[[], object], ...] = (
                lambda: again.commit(make_batch([4])),
                lambda: catalogue(again, make_ids(4)),
                lambda: again.fill(make_ids(3), make_blocks(make_ids(3))),
                lambda: again.commit(make_batch([]), replacing=make_ids(1)),
                lambda: write(again, make_ids(4)),
                lambda: again.reserve(1),
                lambda: again.discard(make_ids(1)),
                lambda: again.change(Changes({1: ()})),
                lambda: again.change(Changes(states={"a": None})),
                lambda: again.quarantine(1, "bad"),
                lambda: again.set_meta("a", b"1"),
            )
            for change in (*changes, *changes):
                with pytest.raises(TierReadOnlyError):
                    change()
            assert contents(again) == before

    def test_reading_only_makes_nothing(self) -> None:
        with pytest.raises(BankMissingError):
            self.open(self.folder / "none", read_only=True)
        assert not (self.folder / "none").exists()

    # Other processes

    def test_two_may_not_write(self, home: Home, other: OtherProcess) -> None:
        if self.several_writers:
            pytest.skip("several may write this home")
        home.commit(make_batch([1, 2]))
        with pytest.raises(BankBusyError):
            self.open(self.place)
        refused = self.open_there(other, read_only=False)
        assert refused.get("error") == "BankBusyError"
        assert "\n" not in refused["message"]
        home.commit(make_batch([3]))  # whoever was there first still writes
        home.close()
        assert self.open_there(other, read_only=False) == {}
        with pytest.raises(BankBusyError):
            self.open(self.place)

    def test_the_revision_rises_with_every_change_and_with_nothing_else(self, home: Home) -> None:
        for name, change in CHANGES.items():
            before = home.revision()
            contents(home)
            assert home.revision() == before
            change(home)
            assert home.revision() > before or name == "opening"

    def test_a_reader_beside_the_writer_sees_every_change(self, home: Home, other: OtherProcess) -> None:
        assert self.open_there(other, read_only=True) == {}
        for name, change in CHANGES.items():
            change(home)
            assert other.ask("look") == {"contents": digest(home)}, f"the reader does not see the {name}"
        assert other.ask("close") == {}
        home.commit(make_batch([50]))

    def test_what_a_killed_process_had_committed_is_there(self, other: OtherProcess) -> None:
        """Every reported batch is whole, and the one that was being written is whole or absent."""
        assert self.open_there(other, read_only=False) == {}
        other.tell("commit", [0, 10_000, 3])
        heard = [other.hear() for _ in range(7)]
        heard += other.kill()
        told = heard[-1]["committed"]
        with self.open(self.place) as home:
            assert home.next_id() in (told, told + 3)
            assert home.ids().tolist() == list(range(home.next_id()))
            check_whole(home, home.ids())
            home.commit(make_batch([home.next_id()]))
