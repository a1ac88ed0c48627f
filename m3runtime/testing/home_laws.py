"""The base of the laws of a home: opening it, and calls of all its methods."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from m3runtime.memory.block import Ids
from m3runtime.storage.home import Changes, Home
from m3runtime.storage.tier import Tier
from m3runtime.testing.blocks import make_batch, make_blocks, make_embeddings, make_ids
from m3runtime.testing.tier import UNKNOWN, TierContract


class HomeLaws(TierContract):
    """The base of the themes that `HomeContract` joins."""

    of_files: ClassVar[bool] = True
    """Does everything that the home keeps lie in files of the folder that `open` is given?

    If not, laws about those files are skipped: what a copy of them holds, and whether they are on the drive.
    """

    several_writers: ClassVar[bool] = False
    """May several processes have the home open for writing at once? If not, laws about that are skipped."""

    @abstractmethod
    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        """Open the home in this folder, with slots of `SLOT_BYTES`; make it if it is missing, unless ``read_only``.

        Another process calls it too, on an instance of your class (at the top of its module) that pytest did not make.
        """

    @property
    def place(self) -> Path:
        """The folder of the fixture ``home``."""
        return self.folder / "home"

    @pytest.fixture
    def home(self) -> Iterator[Home]:
        """A new home, closed afterwards."""
        home = self.open(self.place)
        yield home
        home.close()

    @pytest.fixture
    def tier(self, home: Home) -> Tier:
        """The home as a tier; the fixture ``home`` closes it."""
        return home

    def calls(self, tier: Tier, ids: Ids) -> Sequence[Callable[[], object]]:
        """Calls of all methods, as `TierContract.calls` asks for."""
        assert isinstance(tier, Home)
        none = make_ids()
        return [
            *super().calls(tier, ids),
            lambda: tier.commit(make_batch([])),
            lambda: tier.commit(make_batch([]), replacing=make_ids(UNKNOWN)),
            lambda: tier.catalogue(none, [], make_embeddings(none)),
            tier.cold,
            lambda: tier.cold(ids),
            lambda: tier.fill(make_ids(UNKNOWN), make_blocks(make_ids(UNKNOWN))),
            tier.next_id,
            tier.unused,
            lambda: tier.reserve(1),
            lambda: tier.find(["a"]),
            lambda: tier.references(ids),
            tier.ids,
            lambda: tier.ids_of("a"),
            tier.sources,
            tier.states,
            tier.expiring,
            lambda: tier.expiring("2027-01-31"),
            lambda: tier.change(Changes()),
            lambda: list(tier.embeddings()),
            lambda: list(tier.embeddings(ids)),
            lambda: tier.quarantine(UNKNOWN, "bad"),
            tier.quarantined,
            lambda: tier.get_meta("a"),
            lambda: tier.set_meta("a", b""),
            tier.revision,
            tier.stored_bytes,
            lambda: tier.widen(tier.slot_bytes),
            tier.compact,
            lambda: tier.references(none),
        ]
