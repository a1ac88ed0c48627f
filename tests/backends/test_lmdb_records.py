"""Records of an LMDB home that are damaged: found when they are read and by the audit, and forgotten all the same."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from m3backends.lmdb.home import LmdbHome
from m3runtime.documents.reference import Place
from m3runtime.errors import BankError, InputError, M3Error, RecordError
from m3runtime.storage.home import Damage
from m3runtime.testing.blocks import DIM, LAST_ID, SLOT_BYTES, make_ids, make_reference
from m3runtime.testing.home import contents
from m3runtime.testing.tier import check_read
from tests.backends.lmdb_raw import NAMES, change, database, flipped, key_of, records, sealed, unit_batch

IDS = range(1, 6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed home that has something in every database; 3 is quarantined."""
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(unit_batch(IDS))
        home.quarantine(3, "rotten")
        home.set_meta("manifest", b"something")
    return tmp_path / "home"


def told(path: Path) -> dict[str, object]:
    """All that a home tells, or the errors in its place."""
    with LmdbHome(path=path, read_only=True) as home:
        answers, said = dict[str, object](), list[str]()
        for name, ask in {
            **{f"reference {id}": lambda id=id: home.references(make_ids(id)) for id in IDS},
            **{f"text {id}": lambda id=id: home.find([make_reference(id).text]) for id in IDS},
            **{f"embedding {id}": lambda id=id: [v.tolist() for _, v in home.embeddings(make_ids(id))] for id in IDS},
            **{f"source {id}": lambda id=id: home.ids_of(make_reference(id).source).tolist() for id in range(3)},
            "ids": lambda: home.ids().tolist(),
            "sources": home.sources,
            "quarantined": home.quarantined,
            "meta": lambda: home.get_meta("manifest"),
            "next": home.next_id,
        }.items():
            try:
                answers[name] = ask()
            except RecordError as error:
                answers[name] = RecordError
                said.append(str(error))
    assert all(str(path) in line and "\n" not in line for line in said)
    return answers


def audited(home: LmdbHome) -> list[Damage]:
    steps: list[tuple[int, int]] = []
    found = list(home.audit(lambda done, of: steps.append((done, of))))
    assert steps[-1][0] == steps[-1][1]
    assert steps == sorted(steps)
    return found


def test_a_sound_home_is_audited_clean_whether_or_not_it_is_open_for_writing(path: Path) -> None:
    for read_only in (True, False):
        with LmdbHome(path=path, read_only=read_only) as home:
            assert audited(home) == []


def test_an_audit_of_many_records_and_of_a_source_with_many_members(tmp_path: Path) -> None:
    """More than are looked at in one transaction; what was forgotten between two of them is not missed."""
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(unit_batch(range(3500)))
        assert audited(home) == []
        forgotten = 0
        for _ in range(2):
            for _ in home.audit(lambda done, _: home.discard(make_ids(done % 3500))):
                forgotten += 1
        assert forgotten == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("blocks", "members")])
def test_no_flipped_bit_of_a_record_passes_for_an_answer(path: Path, name: str) -> None:
    """In any record and any bit: an error where it is read or opened, and everything else as it was."""
    random, before = Random(name), told(path)
    for key, value in records(path, name):
        if key == b"version":
            continue
        for bit in random.sample(range(8 * len(value)), 3):
            change(path, name, key, lambda value, bit=bit: flipped(value, bit))
            if name == "home":
                with pytest.raises(BankError, match="is damaged"):
                    told(path)
            else:
                after = told(path)
                wrong = [what for what in before if after[what] not in (before[what], RecordError)]
                assert not wrong
                assert RecordError in after.values()
                with LmdbHome(path=path) as home:
                    assert audited(home)
            change(path, name, key, lambda value, bit=bit: flipped(value, bit))
    assert told(path) == before


@pytest.mark.parametrize("name", [*NAMES[1:], "home"])
def test_a_flipped_bit_of_a_key_is_found_by_the_audit(path: Path, name: str) -> None:
    random = Random(name)
    for key, value in records(path, name):
        moved = flipped(key, random.randrange(8 * len(key)))
        if name == "members":
            with database(path, name) as (txn, _):
                txn.delete(key, value)
                txn.put(moved, value)
        else:
            change(path, name, key, lambda _: None)
            change(path, name, moved, lambda _, value=value: value)
        try:
            with LmdbHome(path=path, read_only=True) as home:
                assert audited(home)
                assert home.next_id() == 6
        except BankError:
            assert name == "home"
        if name == "members":
            with database(path, name) as (txn, _):
                txn.delete(moved, value)
                txn.put(key, value)
        else:
            change(path, name, moved, lambda _: None)
            change(path, name, key, lambda _, value=value: value)


def test_a_damaged_record_is_named(path: Path) -> None:
    change(path, "references", key_of(2), lambda value: flipped(value, 100))
    change(path, "embeddings", key_of(4), lambda value: flipped(value, 100))
    with LmdbHome(path=path) as home:
        with pytest.raises(RecordError, match="the record of 2 in references is damaged") as caught:
            home.references(make_ids(1, 2))
        assert caught.value.id == 2
        with pytest.raises(RecordError, match="the record of 4 in embeddings is damaged") as caught:
            list(home.embeddings())
        assert caught.value.id == 4
        assert {(one.where, one.id) for one in audited(home)} == {("reference", 2), ("embedding", 4)}


@pytest.mark.parametrize("value", [b"", b"12345", np.full(8, np.nan, "<f4").tobytes()])
def test_an_embedding_that_is_none_is_damaged_though_its_digest_fits(path: Path, value: bytes) -> None:
    change(path, "embeddings", key_of(4), lambda _: sealed("embeddings", key_of(4), value))
    with LmdbHome(path=path) as home:
        with pytest.raises(RecordError):
            list(home.embeddings())
        assert {(one.where, one.id) for one in audited(home)} == {("embedding", 4)}


def test_an_embedding_that_is_not_of_length_1_is_found_by_the_audit(path: Path) -> None:
    vector = np.zeros(DIM, "<f4")
    vector[0] = 1.002
    change(path, "embeddings", key_of(4), lambda _: sealed("embeddings", key_of(4), vector.tobytes()))
    with LmdbHome(path=path) as home:
        assert [(one.where, one.id, one.what) for one in audited(home)] == [
            ("embedding", 4, "its length is 1.002, not 1")
        ]


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"\xff", b"[" * 200_000, b"{}", b'"text"', b"[1,2,3,4,5]", b'["t","s",0,1]', b'["t","s",0,1,true]'),
        b'["t","s",0,1,' + b"9" * 5000 + b"]",
        b'["t",[],0,1,1]',
    ],
)
def test_a_reference_that_is_none_is_damaged_though_its_digest_fits(path: Path, value: bytes) -> None:
    change(path, "references", key_of(4), lambda _: sealed("references", key_of(4), value))
    with LmdbHome(path=path) as home:
        with pytest.raises(RecordError):
            home.references(make_ids(4))
        assert ("reference", 4) in {(one.where, one.id) for one in audited(home)}
        home.discard(make_ids(4))
        assert audited(home) == []


@pytest.mark.parametrize("ids", [[2], [3], [2, 5], list(IDS)])
def test_what_is_damaged_is_forgotten_without_a_trace(path: Path, ids: list[int]) -> None:
    for id in ids:
        change(path, "references", key_of(id), lambda value: flipped(value, 77))
    with LmdbHome(path=path) as home:
        home.discard(make_ids(*ids))
        assert audited(home) == []
        left = make_ids(*(id for id in IDS if id not in (3, *ids)))
        assert home.ids().tolist() == left.tolist()
        assert check_read(home, left).all()
        assert home.references(left) == [make_reference(id) for id in left.tolist()]
        assert not check_read(home, make_ids(*ids)).any()
        texts = [replace(make_reference(id), places=(Place("elsewhere", 0, 1),)) for id in ids]
        home.commit(replace(unit_batch(range(20, 20 + len(ids))), references=texts))
        assert home.ids_of("elsewhere").tolist() == list(range(20, 20 + len(ids)))
        assert audited(home) == []


@pytest.mark.parametrize("name", ["digests", "sources"])
def test_computing_it_anew_mends_the_record_of_a_text_or_source(path: Path, name: str) -> None:
    for key, _ in records(path, name)[:2]:
        change(path, name, key, lambda value: flipped(value, 3))
    with LmdbHome(path=path) as home:
        damaged = sorted({one.id for one in audited(home) if one.id is not None})
        assert len(damaged) == 2
        references = [one for one in home.references(make_ids(*damaged)) if one is not None]
        home.commit(replace(unit_batch([20, 21]), references=references), replacing=make_ids(*damaged))
        assert audited(home) == []
        assert home.find([one.text for one in references]) == [20, 21]
        assert sum(home.sources().values()) == len(IDS)


def test_a_member_that_became_another_is_mended_in_either_order(path: Path) -> None:
    for first in ("phantom", "real"):
        with LmdbHome(path=path) as home:
            id = int(home.ids()[0])
            text = home.references(make_ids(id))[0]
            assert text is not None
            new = home.next_id()
        with database(path, "members") as (txn, db):
            (key, _), *_ = [(k, v) for k, v in txn.cursor(db) if v == key_of(id)]
            txn.delete(key, key_of(id))
            txn.put(key, key_of(999))
        with LmdbHome(path=path) as home:
            with pytest.raises(RecordError):
                home.ids_of(text.source)
            assert {one.id for one in audited(home)} == {id, 999, None}
            if first == "phantom":
                home.discard(make_ids(999))
            home.commit(replace(unit_batch([new]), references=[text]), replacing=make_ids(id))
            home.discard(make_ids(999))
            assert audited(home) == []
            assert new in home.ids_of(text.source)


def test_the_next_id_is_above_all_in_use_whatever_its_record_says(path: Path) -> None:
    change(path, "home", b"next_id", lambda _: sealed("home", b"next_id", b"2"))
    with LmdbHome(path=path) as home:
        assert home.next_id() == 6
        assert [one.what for one in audited(home)] == ["the next id is 2, and 5 is in use"]
        with pytest.raises(InputError):
            home.commit(unit_batch([5]))
        home.commit(unit_batch([6]))
        assert audited(home) == []


@pytest.mark.parametrize("key", [b"next_id", b"slot_bytes"])
@pytest.mark.parametrize("value", [None, b"", b"-1", b"9" * 5000, b"many", b"99999999999999999999"])
def test_a_home_that_states_what_cannot_be_is_refused(path: Path, key: bytes, value: bytes | None) -> None:
    change(path, "home", key, lambda _: None if value is None else sealed("home", key, value))
    with pytest.raises(BankError, match="is damaged") as caught:
        LmdbHome(path=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("key", [b"x", b"y" * 9, b"z" * 511])
def test_keys_and_members_that_are_none_end_in_typed_errors(path: Path, name: str, key: bytes) -> None:
    change(path, name, key, lambda _: sealed(name, key, b"1234"))
    with LmdbHome(path=path) as home:
        for ask in (
            home.ids,
            home.sources,
            home.quarantined,
            home.next_id,
            lambda: home.ids_of(make_reference(1).source),
            lambda: contents(home),
            lambda: home.commit(unit_batch([20])),
            lambda: home.discard(make_ids(1, 99)),
        ):
            with suppress(M3Error):
                ask()
        if name not in ("meta", "digests"):
            assert audited(home)


def test_ids_at_the_end_are_audited(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(unit_batch([0, LAST_ID]))
        assert audited(home) == []
