"""An index file or record that is not what it should be: rebuilt from the home, and given to no library."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3runtime.bank.index import INDEX
from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long


def file_of(place: Place) -> Path:
    return place.bank / INDEX


def change(place: Place, work: Callable[[bytes], bytes]) -> None:
    file = file_of(place)
    file.write_bytes(work(file.read_bytes()))


def changed(work: Callable[[bytes], bytes]) -> Case:
    return Case(partial(change, work=work), "^whole$")


def put_record(place: Place, value: bytes) -> None:
    """A record with a right seal, as whoever knows the format can write it."""
    raw.put(place, "meta", b"index", raw.sealed("meta", b"index", value))


def stated_of(place: Place) -> dict[str, Any]:
    stated: dict[str, Any] = json.loads(raw.get(place, "meta", b"index")[8:])
    return stated


def record(value: bytes) -> Case:
    return Case(partial(put_record, value=value), "^whole$")


def state(place: Place, some: dict[str, Any]) -> None:
    put_record(place, json.dumps({**stated_of(place), **some}).encode())


def states(**some: Any) -> Case:
    return Case(partial(state, some=some), "^whole$")


def vouched_for(place: Place, data: bytes) -> None:
    """Other bytes and a record that fits them: the doing of someone who can write the home, and so the bank."""
    file_of(place).write_bytes(data)
    state(place, {"bytes": len(data), "digest": blake2b(data, digest_size=32).hexdigest()})


def another_in_its_clothes(place: Place) -> None:
    vouched_for(place, (place.folder / "other" / "bank" / INDEX).read_bytes())


def without_record(place: Place) -> None:
    with raw.records(place, "meta") as (txn, _):
        assert txn.delete(b"index")


def unsealed(place: Place) -> None:
    raw.put(place, "meta", b"index", raw.flip(raw.get(place, "meta", b"index"), 100))


def pipe(place: Place) -> None:
    file_of(place).unlink()
    os.mkfifo(file_of(place))


def folder(place: Place) -> None:
    file_of(place).unlink()
    file_of(place).mkdir()


def link(place: Place, target: str) -> None:
    file_of(place).unlink()
    file_of(place).symlink_to(target)


def gone(place: Place) -> None:
    file_of(place).unlink()


def another_banks(place: Place) -> None:
    shutil.copy(place.folder / "other" / "bank" / INDEX, file_of(place))


def sparse(place: Place) -> None:
    os.truncate(file_of(place), 100 << 30)


class Marking:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def a_pickle(place: Place) -> None:
    file_of(place).write_bytes(pickle.dumps(Marking(place.folder / "marker")))


def a_numpy_file(place: Place) -> None:
    with file_of(place).open("wb") as file:
        np.save(file, np.array([Marking(place.folder / "marker")], object), allow_pickle=True)


CASES: dict[str, Case] = {
    "nothing done": changed(lambda data: data),
    "gone": Case(gone, "^whole$"),
    "empty": changed(lambda data: b""),
    "half": changed(lambda data: data[: len(data) // 2]),
    "a byte less": changed(lambda data: data[:-1]),
    "a byte more": changed(lambda data: data + b"\0"),
    "twice": changed(lambda data: data * 2),
    "zeros": changed(lambda data: bytes(len(data))),
    "a flipped bit": changed(lambda data: raw.flip(data, 8 * 100 + 3)),
    "2^32 - 1 rows": changed(lambda data: b"\xff" * 4 + data[4:]),
    "another bank's": Case(another_banks, "^whole$"),
    "a pickle": Case(a_pickle, "^whole$"),
    "a pickle in a file of numpy": Case(a_numpy_file, "^whole$"),
    "a pipe": Case(pipe, "^whole$"),
    "a folder": Case(folder, "^whole$"),
    "a link to nowhere": Case(partial(link, target="nowhere"), "^whole$"),
    "a link to itself": Case(partial(link, target=INDEX), "^whole$"),
    "a link to zeros without end": Case(partial(link, target="/dev/zero"), "^whole$"),
    "a link to a folder": Case(partial(link, target="/"), "^whole$"),
    "a hole of 100 GB behind it": Case(sparse, "^whole$"),
    "no record, as an earlier release leaves it": Case(without_record, "^whole$"),
    "a record that was damaged": Case(unsealed, "^whole$"),
    "an empty record": record(b""),
    "a record of deep JSON": record(b"[" * 60_000),
    "a record of no JSON": record(b"\xff{"),
    "a record that is a list": record(b"[]"),
    "a record of another field": states(more="x" * 1000),
    "2^62 bytes stated": states(bytes=2**62),
    "-1 bytes stated": states(bytes=-1),
    "bytes stated as text": states(bytes="18"),
    "another kind stated": states(kind="\n" * 1000),
    "another dtype stated": states(dtype="f32"),
    "another digest stated": states(digest="0" * 64),
    "another bank's and a record that fits": Case(another_in_its_clothes, "^less$", forged=True),
    "no bytes and a record that fits": Case(partial(vouched_for, data=b""), "^whole$"),
    "zeros and a record that fits": Case(partial(vouched_for, data=bytes(1000)), "^whole$"),
}


@pytest.mark.parametrize("name", CASES)
def test_index_file(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
