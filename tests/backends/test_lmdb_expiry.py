"""The list of what expires is derived from the references: if it is damaged, they say the same, and the audit tells."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from m3backends.lmdb.home import LmdbHome
from m3runtime.documents.reference import Place
from m3runtime.storage.home import Damage
from m3runtime.testing.blocks import SLOT_BYTES, make_ids
from tests.backends.lmdb_raw import change, flipped, records, sealed, unit_batch

EARLY, LATE = "2026-12-31", "2027-01-31"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed home in which 1 has a last day, and 2 another one."""
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        batch = unit_batch([1, 2, 3])
        places = [Place("a", 0, 1, {"expires": EARLY}), Place("a", 0, 1, {"expires": LATE}), Place("a", 0, 1)]
        references = [replace(one, places=(place,)) for one, place in zip(batch.references, places, strict=True)]
        home.commit(replace(batch, references=references))
    return tmp_path / "home"


def found(path: Path) -> tuple[dict[str, list[int]], list[Damage]]:
    with LmdbHome(path=path, read_only=True) as home:
        return {day: ids.tolist() for day, ids in home.expiring().items()}, list(home.audit())


def forget(path: Path, *ids: int) -> None:
    with LmdbHome(path=path) as home:
        home.discard(make_ids(*ids))


def test_a_sound_list(path: Path) -> None:
    assert found(path) == ({EARLY: [1], LATE: [2]}, [])


@pytest.mark.parametrize("bit", [3, 85, 130])
def test_a_flipped_bit_hides_nothing(path: Path, bit: int) -> None:
    ((key, value), _) = records(path, "expiring")
    if bit < 8 * len(value):
        change(path, "expiring", key, lambda value: flipped(value, bit))
    else:
        change(path, "expiring", key, lambda _: None)
        change(path, "expiring", flipped(key, bit), lambda _: value)
    days, damage = found(path)
    assert days == {EARLY: [1], LATE: [2]}
    assert any("last day" in one.what for one in damage)
    forget(path, *(one.id for one in damage if one.id is not None), 1)
    days, damage = found(path)
    assert (days, damage) == ({LATE: [2]}, [])


@pytest.mark.parametrize(
    ("spoil", "damage"),
    [
        (
            lambda path, key: change(path, "expiring", key, lambda _: None),
            Damage("reference", 1, "it expires and is not listed so"),
        ),
        (
            lambda path, key: change(
                path, "expiring", (more := LATE.encode() + key[-8:]), lambda _: sealed("expiring", more, b"")
            ),
            Damage("home", 1, "it is listed under a last day that it does not have"),
        ),
    ],
)
def test_what_does_not_agree_is_found(path: Path, spoil: Callable[[Path, bytes], None], damage: Damage) -> None:
    ((key, _), _) = records(path, "expiring")
    spoil(path, key)
    assert found(path)[1] == [damage]
