"""A transaction that another came before changes nothing, however long its process was stopped."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lance")

import lance

from m3backends.lance.home import LanceHome
from m3runtime.errors import InputError
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_blocks, make_ids, make_reference
from m3runtime.testing.home import check_whole, contents
from m3runtime.testing.home_cold import catalogue


@pytest.fixture
def homes(tmp_path: Path) -> tuple[LanceHome, LanceHome]:
    """Two writers of one home, which has the references 1 to 5, and 6 cold."""
    one, other = (LanceHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) for _ in range(2))
    one.commit(make_batch(range(1, 6)))
    catalogue(one, make_ids(6))
    return one, other


def stop_before_committing(home: LanceHome, meanwhile: Callable[[], object]) -> None:
    """The next transaction has checked all, and written its files; then ``meanwhile`` happens, and it goes on."""
    location, sync = home._table.location, home._table.location.sync_fragments

    def stopped(fragments: Iterable[Any]) -> None:
        location.sync_fragments = sync  # type: ignore[method-assign]
        sync(fragments)
        meanwhile()

    location.sync_fragments = stopped  # type: ignore[method-assign]


def commit(home: LanceHome, id: int, text: int) -> None:
    home.commit(replace(make_batch([id]), references=[make_reference(text)]))


def compact(home: LanceHome) -> None:
    """`LanceHome.compact`, without waiting for those who write files: as a process of another machine may, whose locks
    are not seen, or as an object store, which has none."""
    home._table.location.folder = None
    home.compact()


MEANWHILE: dict[str, Callable[[LanceHome], object]] = {
    "a commit": lambda home: commit(home, home.reserve(1), 30),
    "commits": lambda home: [commit(home, home.reserve(1), 30 + id) for id in range(5)],
    "commits and compaction": lambda home: (
        commit(home, home.reserve(1), 30),
        home.discard(make_ids(1)),
        compact(home),
    ),
    "commits, compaction and an index": lambda home: (
        commit(home, home.reserve(1), 30),
        compact(home),
        lance.dataset(str(home.path)).create_scalar_index("id", "BTREE"),
        compact(home),
    ),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_text_that_another_added_meanwhile_is_refused(homes: tuple[LanceHome, LanceHome], meanwhile: str) -> None:
    one, other = homes
    own = one.reserve(1)
    stop_before_committing(one, lambda: MEANWHILE[meanwhile](other))
    with pytest.raises(InputError, match="remembered already"):
        commit(one, own, 30)
    assert contents(one) == contents(other)
    assert own not in one.ids()
    assert not [damage for damage in one.audit() if "length" not in damage.what]


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_what_is_still_right_is_done_after_the_others(homes: tuple[LanceHome, LanceHome], meanwhile: str) -> None:
    one, other = homes
    own = one.reserve(2)
    stop_before_committing(one, lambda: MEANWHILE[meanwhile](other))
    one.commit(make_batch([own, own + 1]), replacing=make_ids(2))
    assert contents(one) == contents(other)
    check_whole(one, make_ids(3, 4, 5, own, own + 1))
    assert 2 not in one.ids()
    assert one.find([make_reference(30).text]) != [None]
    assert not [damage for damage in one.audit() if "length" not in damage.what]


def test_an_id_that_another_used_meanwhile_is_refused(homes: tuple[LanceHome, LanceHome]) -> None:
    one, other = homes
    stop_before_committing(one, lambda: other.commit(make_batch([10])))
    with pytest.raises(InputError, match="id 10 was used before"):
        commit(one, 10, 11)
    check_whole(one, make_ids(10))


def test_a_block_that_another_filled_meanwhile_stays(homes: tuple[LanceHome, LanceHome]) -> None:
    one, other = homes
    ids = make_ids(6)
    stop_before_committing(one, lambda: other.fill(ids, make_blocks(ids)))
    assert one.fill(ids, make_blocks(ids, edition=1)).tolist() == [False]
    check_whole(one, ids)


def test_what_another_forgot_meanwhile_stays_forgotten(homes: tuple[LanceHome, LanceHome]) -> None:
    one, other = homes
    stop_before_committing(one, lambda: other.discard(make_ids(6)))
    assert not one.fill(make_ids(6), make_blocks(make_ids(6))).any()
    assert 6 not in one.ids()
    assert one.references(make_ids(6)) == [None]


def test_compaction_makes_room_for_a_commit_that_came_first(homes: tuple[LanceHome, LanceHome]) -> None:
    one, other = homes
    one.discard(make_ids(3))
    location, dataset = one._table.location, one._table.location.dataset

    def stale() -> Any:
        found = dataset()
        location.dataset = dataset  # type: ignore[method-assign]
        other.discard(make_ids(4))
        return found

    location.dataset = stale  # type: ignore[method-assign]
    one.compact()
    assert one.ids().tolist() == [1, 2, 5, 6]
    check_whole(other, make_ids(1, 2, 5))
