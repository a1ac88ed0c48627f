"""Records of a home that are not what they should be: what they are about is missing, or the bank is refused."""

import json
import struct
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import pytest

from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.hostile.banks import DIM, make_reference
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

ID, OTHER = 12, 4
KEY = raw.key_of(ID)
LESS = f"^less$|^missing: {ID}$"
REFUSED = "^refused: Bank(Format|Mismatch|Missing)?Error: "
ANY = f"{REFUSED}|^whole$|^missing|^less$"


def put(place: Place, database: str, key: bytes, value: bytes) -> None:
    raw.put(place, database, key, value)


def stored(database: str, value: bytes, expected: str, key: bytes = KEY) -> Case:
    """A value as it is."""
    return Case(partial(put, database=database, key=key, value=value), expected)


def sealed(database: str, value: bytes, expected: str, key: bytes = KEY) -> Case:
    """A value behind a seal that fits: what it says may be anything."""
    case = stored(database, raw.sealed(database, key, value), expected, key)
    return Case(case.spoil, expected, forged=True)


def change(place: Place, database: str, work: Callable[[bytes], bytes], key: bytes = KEY) -> None:
    put(place, database, key, work(raw.get(place, database, key)))


def flipped(database: str, expected: str, key: bytes = KEY) -> dict[str, Case]:
    """A bit flipped at the beginning, in the middle and at the end, and bytes missing and added."""

    def case(work: Callable[[bytes], bytes]) -> Case:
        return Case(partial(change, database=database, work=work, key=key), expected)

    return {
        f"{database}: a bit flipped in the seal": case(lambda value: raw.flip(value, 3)),
        f"{database}: a bit flipped in the middle": case(lambda value: raw.flip(value, 4 * len(value) + 4 * 8)),
        f"{database}: the last bit flipped": case(lambda value: raw.flip(value, 8 * len(value) - 1)),
        f"{database}: a byte less": case(lambda value: value[:-1]),
        f"{database}: a byte more": case(lambda value: value + b"\0"),
        f"{database}: only a seal": case(lambda value: value[:8]),
        f"{database}: seven bytes": case(lambda value: value[:7]),
        f"{database}: no bytes": case(lambda value: b""),
        f"{database}: zeros": case(lambda value: bytes(len(value))),
        f"{database}: 16 MiB more": case(lambda value: value + bytes(16 << 20)),
    }


def taken(place: Place, database: str, key: bytes = KEY) -> None:
    """What another key has, whose seal does not fit this one."""
    put(place, database, key, raw.get(place, database, raw.key_of(OTHER)))


def removed(place: Place, database: str, key: bytes = KEY) -> None:
    with raw.records(place, database) as (txn, _):
        assert txn.delete(key)


def emptied(place: Place, database: str) -> None:
    with raw.records(place, database) as (txn, db):
        txn.drop(db, delete=False)


def odd_keys(place: Place, database: str) -> None:
    for key in (b"\0", b"odd", b"\xff" * 9, b"\xff" * 8):
        put(place, database, key, b"value")


def members(place: Place, source: bytes, value: bytes) -> None:
    with raw.records(place, "members") as (txn, _):
        txn.put(source, value)


def digest_of(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=32).digest()


TEXT = digest_of(make_reference(ID).text)
SOURCE = digest_of(make_reference(ID).source)
DEEP = b"[" * 100_000 + b"]" * 100_000


def reference(*fields: object) -> Case:
    return sealed("references", json.dumps(fields).encode(), LESS)


def vector(*numbers: float) -> Case:
    return sealed("embeddings", struct.pack(f"<{len(numbers)}f", *numbers), LESS)


CASES: dict[str, Case] = {
    **flipped("references", LESS),
    **flipped("embeddings", LESS),
    **flipped("digests", "^less$|^whole$", TEXT),
    **flipped("sources", "^less$|^whole$", SOURCE),
    **flipped("home", ANY, b"next_id"),
    **{f"slots, {name}": case for name, case in flipped("home", REFUSED, b"slot_bytes").items()},
    "the reference of another": Case(partial(taken, database="references"), LESS),
    "the embedding of another": Case(partial(taken, database="embeddings"), LESS),
    "no reference": Case(partial(removed, database="references"), LESS),
    "no embedding": Case(partial(removed, database="embeddings"), LESS),
    "no digest": Case(partial(removed, database="digests", key=TEXT), "^less$"),
    "no source": Case(partial(removed, database="sources", key=SOURCE), "^less$"),
    "no members": Case(partial(removed, database="members", key=SOURCE), "^less$|^whole$"),
    "a reference that is no JSON": sealed("references", b"\xff", LESS),
    "a reference of deep JSON": sealed("references", DEEP, LESS),
    "a reference of a number of 5000 digits": sealed("references", b'["a","b",1,2,' + b"9" * 5000 + b"]", LESS),
    "a reference that is a mapping": sealed("references", b"{}", LESS),
    "a reference of no fields": reference(),
    "a reference of a field less": reference("a", "b", 1, 2),
    "a reference of a field more": reference("a", "b", 1, 2, 3, 4),
    "a text that is a number": reference(7, "b", 1, 2, 3),
    "a source that is a list": reference("a", ["b"], 1, 2, 3),
    "tokens that are text": reference("a", "b", 1, 2, "3"),
    "tokens that are true": reference("a", "b", 1, 2, True),
    "a start of NaN": reference("a", "b", float("nan"), 2, 3),
    "an embedding of NaN": vector(float("nan"), *[0.1] * (DIM - 1)),
    "an embedding of infinity": vector(float("inf"), *[0.1] * (DIM - 1)),
    "an embedding of the largest numbers": sealed(
        "embeddings", struct.pack(f"<{DIM}f", *[3.4e38] * DIM), "^less$|^whole$"
    ),
    "an embedding of a number less": vector(*[0.1] * (DIM - 1)),
    "an embedding of a number more": vector(*[0.1] * (DIM + 1)),
    "an embedding of nothing": sealed("embeddings", b"", LESS),
    "an embedding of three bytes": sealed("embeddings", b"abc", LESS),
    "an embedding of 64 MiB": sealed("embeddings", bytes(64 << 20), LESS),
    "the id of another for a text": sealed("digests", raw.key_of(OTHER), "^less$|^whole$", TEXT),
    "no id for a text": sealed("digests", b"", "^less$|^whole$", TEXT),
    "nine bytes for an id": sealed("digests", b"\0" * 9, "^less$|^whole$", TEXT),
    "a source of no text": sealed("sources", b"\0" * 8 + b"\xff", "^less$|^whole$", SOURCE),
    "a source of 2^64 - 1 references": sealed("sources", b"\xff" * 8 + b"notes", "^less$|^whole$", SOURCE),
    "a source without a name": sealed("sources", b"\0", "^less$|^whole$", SOURCE),
    "a member that is no id": Case(partial(members, source=SOURCE, value=b"odd"), "^less$|^whole$"),
    "a member that is nobody": Case(partial(members, source=SOURCE, value=raw.key_of(999)), "^less$|^whole$"),
    "set apart": sealed("quarantine", b"why not", LESS),
    "set apart, sealed wrong": stored("quarantine", b"12345678why not", LESS),
    "set apart for a reason of many lines": sealed("quarantine", b"why\nnot\x1b[2J", LESS),
    "set apart for no text": sealed("quarantine", b"\xff\xfe", LESS),
    "nobody set apart": sealed("quarantine", b"why not", "^whole$|^less$", raw.key_of(999)),
    "version 1": stored("home", b"1", REFUSED, b"version"),
    "version 4": stored("home", b"4", REFUSED, b"version"),
    "version 10^19": stored("home", b"1" + b"0" * 19, REFUSED, b"version"),
    "a version of 5000 digits": stored("home", b"9" * 5000, REFUSED, b"version"),
    "a version that is no number": stored("home", b"two\n", REFUSED, b"version"),
    "a version of no bytes": stored("home", b"", REFUSED, b"version"),
    "no version": Case(partial(removed, database="home", key=b"version"), REFUSED),
    "no slots": Case(partial(removed, database="home", key=b"slot_bytes"), REFUSED),
    "no next id": Case(partial(removed, database="home", key=b"next_id"), REFUSED),
    "slots of 0 bytes": sealed("home", b"0", REFUSED, b"slot_bytes"),
    "slots of 63 bytes": sealed("home", b"63", REFUSED, b"slot_bytes"),
    "slots of -1 bytes": sealed("home", b"-1", REFUSED, b"slot_bytes"),
    "slots of 2^40 bytes": sealed("home", b"%d" % 2**40, REFUSED, b"slot_bytes"),
    "slots of 2^32 bytes": sealed("home", b"%d" % 2**32, REFUSED, b"slot_bytes"),
    "slots of a byte more": sealed("home", b"2945", ANY, b"slot_bytes"),
    "slots of NaN": sealed("home", b"NaN", REFUSED, b"slot_bytes"),
    "slots in Arabic digits": sealed("home", "٣٤".encode(), REFUSED, b"slot_bytes"),
    "the next id 0": sealed("home", b"0", ANY, b"next_id"),
    "the next id 2^64": sealed("home", b"%d" % 2**64, ANY, b"next_id"),
    "the next id 10^30": sealed("home", b"1" + b"0" * 30, REFUSED, b"next_id"),
    "a packing that nobody knows": sealed("home", b"brotli", REFUSED, b"packing"),
    "a dictionary that is none": sealed("home", b"dictionary", REFUSED, b"dictionary"),
    "a packing without its dictionary": sealed("home", b"dictionary", REFUSED, b"packing"),
}
for database in raw.NAMES:
    CASES[f"{database}: emptied"] = Case(partial(emptied, database=database), ANY)
    CASES[f"{database}: keys that are none"] = Case(partial(odd_keys, database=database), f"{ANY}|^refused: Record")


@pytest.mark.parametrize("name", CASES)
def test_record(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
