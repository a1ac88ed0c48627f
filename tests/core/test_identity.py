"""A bank has one identity, and no other bank has the same."""

from pathlib import Path

from m3backends.lmdb.home import LmdbHome
from m3runtime.bank.identity import identify, identity_of
from m3runtime.testing.blocks import SLOT_BYTES


def test_a_bank_keeps_its_identity(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path / "a", slot_bytes=SLOT_BYTES) as home:
        mine = identify(home)
        assert identity_of(home, "other") == identity_of(home, "other") == mine
    with LmdbHome(path=tmp_path / "a", read_only=True) as home:
        assert identity_of(home, "other") == mine
    with LmdbHome(path=tmp_path / "b", slot_bytes=SLOT_BYTES) as home:
        assert identify(home) != mine


def test_a_bank_of_an_earlier_release_gets_one_when_it_is_written(tmp_path: Path) -> None:
    LmdbHome(path=tmp_path / "a", slot_bytes=SLOT_BYTES).close()
    with LmdbHome(path=tmp_path / "a", read_only=True) as home:
        assert identity_of(home, "other") == "other"
    with LmdbHome(path=tmp_path / "a") as home:
        given = identity_of(home, "other")
        assert len(given) == 32
        assert identity_of(home, "other") == given
