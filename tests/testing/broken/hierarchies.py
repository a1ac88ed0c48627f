"""Hierarchies with one mistake each, which no contract of a single tier could see."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import PinnedTier
from m3runtime.memory.block import Ids
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import SLOT_BYTES
from m3runtime.testing.hierarchy import HierarchyMachine


class ForgetsInTheHomeAlone(Hierarchy):
    def discard(self, ids: Ids) -> None:
        self.home.discard(ids)


class ServesWhatIsBad(Hierarchy):
    def spoil(self) -> None:
        for level in self._levels:
            level._bad = lambda *_: {}  # type: ignore[method-assign]


class Machine(HierarchyMachine):
    kind: type[Hierarchy] = Hierarchy

    def make_tiers(self) -> list[PinnedTier]:
        return [PinnedTier(slot_bytes=SLOT_BYTES, capacity=slots * SLOT_BYTES) for slots in (2, 5)]

    def open_home(self, folder: Path) -> LmdbHome:
        return LmdbHome(path=folder, slot_bytes=SLOT_BYTES)

    def corrupt(self, home: Home, id: int) -> bool:
        assert isinstance(home, LmdbHome)
        key = id.to_bytes(8, "big")
        with home._environment.env.begin(write=True, db=home._db.blocks) as txn:
            block = txn.get(key)
            if block is not None:
                txn.put(key, block[:-1] + bytes([block[-1] ^ 1]))
        return block is not None

    def start(self) -> None:
        super().start()
        self.hierarchy.__class__ = self.kind
        if isinstance(self.hierarchy, ServesWhatIsBad):
            self.hierarchy.spoil()


SETTINGS = settings(
    max_examples=400,  # it ends with the first that fails
    stateful_step_count=50,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def make_test(name: str, kind: type[Hierarchy], settings: settings = SETTINGS) -> Any:
    test: Any = type(name, (Machine,), {"kind": kind, "__module__": __name__}).TestCase  # type: ignore[attr-defined]
    test.settings = settings
    test.__name__ = test.__qualname__ = name
    return test


BROKEN = Hierarchy.__subclasses__()
globals().update({f"Test{kind.__name__}": make_test(f"Test{kind.__name__}", kind) for kind in BROKEN})
TestIntact = make_test("TestIntact", Hierarchy, settings(SETTINGS, max_examples=5))
