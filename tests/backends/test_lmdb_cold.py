"""Cold references in an LMDB home: what its audit finds, homes of earlier releases, and room."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from m3backends.lmdb.compression import ENOUGH
from m3backends.lmdb.home import LmdbHome
from m3runtime.documents.reference import Place
from m3runtime.documents.sources import SourceState
from m3runtime.errors import BankFormatError, BankFullError
from m3runtime.storage.home import Changes, Damage
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_blocks, make_ids
from m3runtime.testing.home import check_whole, contents
from m3runtime.testing.home_cold import catalogue
from m3runtime.testing.tier import check_read
from tests.backends.lmdb_raw import change, database, flipped, key_of, records, sealed, unit_batch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed home in which 1, 4 and 6 are cold, and 4 is quarantined."""
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        for id in range(7):
            if id in (1, 4, 6):
                add(home, id)
            else:
                home.commit(unit_batch([id]))
        home.quarantine(4, "rotten")
        home.quarantine(5, "rotten")
    return tmp_path / "home"


def audited(path: Path) -> list[Damage]:
    with LmdbHome(path=path, read_only=True) as home:
        return list(home.audit())


def add(home: LmdbHome, id: int) -> None:
    batch = unit_batch([id])
    home.catalogue(batch.ids, batch.references, batch.embeddings)


def without_later(path: Path) -> None:
    """Make it a home of an earlier release: of schema 2, whose references have one place and no heading."""
    with lmdb.open(str(path), max_dbs=16, map_size=1 << 30) as env:
        for name in (b"cold", b"states"):
            db = env.open_db(name, create=False)
            with env.begin(write=True) as txn:
                txn.drop(db)
    change(path, "home", b"version", lambda _: b"2")
    for key, value in records(path, "references"):
        text, tokens, _, ((source, start, end, _),) = json.loads(value[8:].decode("utf-8", "surrogatepass"))
        fields = json.dumps([text, source, start, end, tokens], ensure_ascii=False).encode("utf-8", "surrogatepass")
        change(path, "references", key, lambda _, key=key, fields=fields: sealed("references", key, fields))


def test_cold_references_are_no_damage(path: Path) -> None:
    assert audited(path) == []
    with LmdbHome(path=path, read_only=True) as home:
        assert home.cold().tolist() == [1, 6]
        assert len(home) == 3
        assert home.ids().tolist() == [0, 1, 2, 3, 6]


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_a_flipped_bit_of_a_mark_or_of_its_key_is_found(path: Path, bit: int) -> None:
    ((key, value), *_) = records(path, "cold")
    change(path, "cold", key, lambda value: flipped(value, bit))
    assert audited(path) == [Damage("home", 1, "the record that it is cold is damaged")]
    change(path, "cold", key, lambda _: None)
    change(path, "cold", moved := flipped(key, bit), lambda _: value)
    found = audited(path)
    assert Damage("reference", 1, "it has no block") in found
    assert Damage("home", int.from_bytes(moved, "big"), "the record that it is cold is damaged") in found


@pytest.mark.parametrize(
    ("id", "damage"),
    [
        (2, Damage("home", 2, "it is cold and has a block")),
        (9, Damage("home", 9, "it is cold and has no reference")),
    ],
)
def test_a_mark_that_does_not_belong_there_is_found_and_does_no_harm(path: Path, id: int, damage: Damage) -> None:
    change(path, "cold", key_of(id), lambda _: sealed("cold", key_of(id), b""))
    assert audited(path) == [damage]
    with LmdbHome(path=path) as home:
        before = contents(home)["blocks"]
        if id == 2:
            assert home.cold().tolist() == [1, 6]
            assert not home.fill(make_ids(2), make_blocks(make_ids(2), edition=1)).any()
        assert contents(home)["blocks"] == before
        home.discard(make_ids(id))
    assert audited(path) == []


def test_a_missing_block_is_no_cold_reference(path: Path) -> None:
    change(path, "blocks", key_of(2), lambda _: None)
    assert audited(path) == [Damage("reference", 2, "it has no block")]
    with LmdbHome(path=path) as home:
        assert home.cold(make_ids(2)).tolist() == []
        assert not home.fill(make_ids(2), make_blocks(make_ids(2))).any()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_home_of_an_earlier_release_is_read_and_written(tmp_path: Path, read_only: bool) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(unit_batch(range(3)))
        home.quarantine(1, "rotten")
        before = contents(home)
    without_later(tmp_path)
    with LmdbHome(path=tmp_path, read_only=read_only) as home:
        assert contents(home) == before
        assert home.states() == {}
        assert home.cold(make_ids(0, 1, 7)).tolist() == []
        assert list(home.audit()) == []
        if not read_only:
            home.discard(make_ids(0))
            add(home, 5)
            assert home.fill(make_ids(5, 1), make_blocks(make_ids(5, 1))).tolist() == [True, False]
            add(home, 6)
            home.change(Changes({2: (Place("moved", 0, 1),)}, {"moved": SourceState(1, 2, "3", "4")}))
    if not read_only:
        with LmdbHome(path=tmp_path, read_only=True) as home:
            assert check_read(home, make_ids(2, 5)).all()
            assert home.ids().tolist() == [2, 5, 6]
            assert home.cold().tolist() == [6]
            assert (home.ids_of("moved").tolist(), list(home.states())) == ([2], ["moved"])
            assert list(home.audit()) == []
    assert (b"version", b"2" if read_only else b"3") in records(tmp_path, "home")


def test_a_home_that_is_refused_is_left_as_it_is(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([1]))
    without_later(tmp_path)
    change(tmp_path, "home", b"version", lambda _: b"4")
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(BankFormatError):
        LmdbHome(path=tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_what_is_filled_is_compressed_as_the_others_are(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES, compression="zstd") as home:
        catalogue(home, make_ids(*range(2 * ENOUGH)))
        for start in range(0, 2 * ENOUGH, ENOUGH):
            ids = make_ids(*range(start, start + ENOUGH))
            assert home.fill(ids, make_blocks(ids)).all()
        check_whole(home, make_ids(*range(2 * ENOUGH)))


def test_without_room_nothing_is_filled_and_forgetting_makes_some(tmp_path: Path) -> None:
    big, count = 64 << 10, 40

    def fill(home: LmdbHome, id: int) -> bool:
        ids = make_ids(id)
        return bool(home.fill(ids, make_blocks(ids, big)).all())

    with LmdbHome(path=tmp_path, slot_bytes=big, max_size=1 << 20) as home:
        catalogue(home, make_ids(*range(count)))
        full = 0
        with suppress(BankFullError):
            while fill(home, full):
                full += 1
        with pytest.raises(BankFullError, match="max_size"):
            fill(home, full)
        assert full
        assert home.cold().tolist() == list(range(full, count))
        assert not home.contains(make_ids(full)).any()
        home.discard(make_ids(*range(full)))
        assert fill(home, full)


def test_a_batch_of_one_text_that_is_cold_may_replace_it(path: Path) -> None:
    batch = replace(make_batch([20]), references=unit_batch([1]).references)
    with LmdbHome(path=path) as home:
        home.commit(batch, replacing=make_ids(1))
        assert home.cold().tolist() == [6]
        assert home.find([batch.references[0].text]) == [20]
        assert check_read(home, make_ids(20, 1)).tolist() == [True, False]
    with database(path, "cold") as (txn, db):
        assert txn.stat(db)["entries"] == 2


def test_both_kinds_of_writing_give_equal_bytes(tmp_path: Path) -> None:
    """A home that was filled holds what one that was committed at once holds."""
    told: list[dict[str, object]] = []
    writing: tuple[Callable[[LmdbHome], object], ...] = (
        lambda home: home.commit(make_batch(range(20))),
        lambda home: (catalogue(home, make_ids(*range(20))), home.fill(ids, make_blocks(ids))),
    )
    ids = make_ids(*range(19, -1, -1))
    for name, write in enumerate(writing):
        with LmdbHome(path=tmp_path / str(name), slot_bytes=SLOT_BYTES) as home:
            write(home)
            told.append(contents(home))
            told[-1]["blocks"] = [bytes(block) for _, block in _stored(home)]
    assert told[0] == told[1]


def _stored(home: LmdbHome) -> list[tuple[bytes, bytes]]:
    with home._environment.env.begin(db=home._db.blocks) as txn:
        return [(bytes(key), bytes(block)) for key, block in txn.cursor()]
