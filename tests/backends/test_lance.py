"""The Lance home: the laws of every home, and what is its own."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("lance")

from m3backends.lance.home import LanceHome
from m3backends.lance.table import LanceTable
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import SLOT_BYTES
from tests.backends.lance_contract import LanceContract


class TestLanceHome(LanceContract):
    def open(self, folder: Path, *, read_only: bool = False) -> LanceHome:
        return LanceHome(path=folder, slot_bytes=SLOT_BYTES, durability="commit", read_only=read_only)

    def test_is_on_the_drive_when_the_call_returns(self, home: Home) -> None:
        home.close()
        shutil.rmtree(self.place)
        with LanceHome(path=self.place, slot_bytes=SLOT_BYTES) as durable:
            super().test_is_on_the_drive_when_the_call_returns(durable)


@pytest.mark.scale
class TestLanceHomeWithIndexes(TestLanceHome):
    """All laws, with the columns indexed after each commit: otherwise a table of 20,000 rows has its first index."""

    @pytest.fixture(autouse=True)
    def _index_always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LanceTable, "index_each", 1)
