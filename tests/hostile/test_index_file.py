"""An index file that is not what it should be: rebuilt from the home, whatever it holds, and given to no library."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import xxhash

from m3runtime.bank.bank import INDEX
from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.hostile.banks import COUNT, DIM, FORGOTTEN
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

HELD = COUNT - len(FORGOTTEN)
HEAD = 8 + 2 * DIM * HELD
"""Where usearch's head begins, behind the vectors in float16: see `m3backends.usearch.layout`."""
GRAPH, LEVELS = HEAD + 64, HEAD + 64 + 40
NODES = LEVELS + 2 * HELD
FLIP = 0x9E3779B97F4A7C15
"""What ids are combined with before usearch sees them."""


def file_of(place: Place) -> Path:
    return place.bank / INDEX


def change(place: Place, work: Callable[[bytes], bytes]) -> None:
    file = file_of(place)
    data = file.read_bytes()
    assert data[HEAD:][:7] == b"usearch"
    file.write_bytes(work(data))


def changed(work: Callable[[bytes], bytes], expected: str = "^whole$", **more: Any) -> Case:
    return Case(partial(change, work=work), expected, **more)


def with_digest(data: bytes) -> bytes:
    """The file with the digest that fits what comes before it."""
    return data[:-16] + xxhash.xxh3_128_digest(data[:-16])


def parts_of(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """usearch's own bytes, and what the trailer states."""
    size = int.from_bytes(data[-32:-24], "little")
    return data[: -32 - size], json.loads(data[-32 - size : -32])


def joined(body: bytes, about: Any, size: int | None = None) -> bytes:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    tail = text + struct.pack("<Q", len(text) if size is None else size) + b"M3INDEX1"
    return body + tail + xxhash.xxh3_128_digest(body + tail)


def states(**some: Any) -> Case:
    """The trailer states something else, with a right digest."""
    return changed(lambda data: joined(parts_of(data)[0], {**parts_of(data)[1], **some}))


def body(work: Callable[[bytes], bytes], expected: str = "^whole$", **more: Any) -> Case:
    """Other bytes for usearch, with a right digest."""
    return changed(lambda data: joined(work(parts_of(data)[0]), parts_of(data)[1]), expected, **more)


def number(at: int, kind: str, value: float) -> Case:
    return body(lambda own: own[:at] + struct.pack(kind, value) + own[at + struct.calcsize(kind) :])


def node(row: int, at: int, kind: str, value: int) -> Case:
    """Another number at ``at`` in a node of level 0; the rows before it may be on any."""

    def work(own: bytes) -> bytes:
        levels = np.frombuffer(own, "<i2", HELD, LEVELS)
        start = NODES + sum(10 + 132 + 68 * int(level) for level in levels[:row]) + at
        return own[:start] + struct.pack(kind, value) + own[start + struct.calcsize(kind) :]

    return body(work)


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


def sparse_inside(place: Place) -> None:
    """A hole of 100 GB between usearch's bytes and a trailer that fits."""
    file = file_of(place)
    data = file.read_bytes()
    own, _ = parts_of(data)
    os.truncate(file, 100 << 30)
    with file.open("r+b") as opened:
        opened.seek(len(own))
        opened.write(bytes(len(data) - len(own)))
        opened.seek(0, os.SEEK_END)
        opened.write(data[len(own) :])


def another_in_its_clothes(place: Place) -> None:
    """Another bank's vectors, under a trailer that fits this one."""
    data = file_of(place).read_bytes()
    other = (place.folder / "other" / "bank" / INDEX).read_bytes()
    file_of(place).write_bytes(joined(parts_of(other)[0], parts_of(data)[1]))


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
    "31 bytes": changed(lambda data: data[:31]),
    "32 bytes": changed(lambda data: data[-32:]),
    "half": changed(lambda data: data[: len(data) // 2]),
    "the other half": changed(lambda data: data[len(data) // 2 :]),
    "a byte less": changed(lambda data: data[:-1]),
    "a byte more": changed(lambda data: data + b"\0"),
    "twice": changed(lambda data: data * 2),
    "zeros": changed(lambda data: bytes(len(data))),
    "another bank's": Case(another_banks, "^whole$"),
    "another bank's under our stamp": Case(another_in_its_clothes, "^less$", forged=True),
    "a pickle": Case(a_pickle, "^whole$"),
    "a pickle in a file of numpy": Case(a_numpy_file, "^whole$"),
    "a pipe": Case(pipe, "^whole$"),
    "a folder": Case(folder, "^whole$"),
    "a link to nowhere": Case(partial(link, target="nowhere"), "^whole$"),
    "a link to itself": Case(partial(link, target=INDEX), "^whole$"),
    "a link to zeros without end": Case(partial(link, target="/dev/zero"), "^whole$"),
    "a link to a folder": Case(partial(link, target="/"), "^whole$"),
    "a hole of 100 GB behind it": Case(sparse, "^whole$"),
    "a hole of 100 GB in it": Case(sparse_inside, "^whole$"),
    "usearch's own file": changed(lambda data: parts_of(data)[0]),
    "only a trailer": changed(lambda data: joined(b"", parts_of(data)[1])),
    "a trailer longer than the file": changed(lambda data: joined(*parts_of(data), size=2**64 - 1)),
    "a trailer as long as the file": changed(lambda data: joined(*parts_of(data), size=len(data) - 32)),
    "a trailer of no bytes": changed(lambda data: joined(parts_of(data)[0], b"")),
    "a trailer of deep JSON": changed(lambda data: joined(parts_of(data)[0], b"[" * 60_000)),
    "a trailer of no JSON": changed(lambda data: joined(parts_of(data)[0], b"\xff{")),
    "a trailer that is a list": changed(lambda data: joined(parts_of(data)[0], [])),
    "a trailer of 1 MB": states(more="x" * (1 << 20)),
    "another version": changed(lambda data: with_digest(data.replace(b"M3INDEX1", b"M3INDEX2"))),
    "more vectors stated": states(count=HELD + 1),
    "2^62 vectors stated": states(count=2**62),
    "-1 vectors stated": states(count=-1),
    "vectors stated as text": states(count="18"),
    "another dim stated": states(dim=DIM * 2),
    "another dtype stated": states(dtype="f32"),
    "another stamp": states(stamp="\n" * 100),
    "a stamp that is none": states(stamp=[]),
    "a dim that is none": states(dim=float(DIM)),
    # With a right digest over what usearch would follow out of its memory.
    "no bytes for usearch": body(lambda own: b""),
    "8 bytes for usearch": body(lambda own: own[:8]),
    "usearch's bytes cut in the vectors": body(lambda own: own[: HEAD - 1]),
    "usearch's bytes cut in the head": body(lambda own: own[: HEAD + 63]),
    "usearch's bytes cut in the levels": body(lambda own: own[: LEVELS + 3]),
    "usearch's bytes cut by one": body(lambda own: own[:-1]),
    "usearch's bytes and one more": body(lambda own: own + b"\0"),
    "2^32 - 1 rows": number(0, "<I", 2**32 - 1),
    "a row less": number(0, "<I", HELD - 1),
    "no rows": number(0, "<I", 0),
    "rows of 2^32 - 1 bytes": number(4, "<I", 2**32 - 1),
    "another magic": number(HEAD, "<B", 0),
    "another metric": number(HEAD + 13, "<B", ord("e")),
    "another kind of scalars": number(HEAD + 14, "<B", 11),
    "another kind of keys": number(HEAD + 15, "<B", 9),
    "another kind of slots": number(HEAD + 16, "<B", 14),
    "2^60 vectors": number(HEAD + 17, "<Q", 2**60),
    "removed vectors that are not": number(HEAD + 25, "<Q", 1),
    "2^40 dimensions": number(HEAD + 33, "<Q", 2**40),
    "no dimensions": number(HEAD + 33, "<Q", 0),
    "many vectors of one key": number(HEAD + 41, "<B", 1),
    "2^61 slots": number(GRAPH, "<Q", 2**61),
    "a slot less": number(GRAPH, "<Q", HELD - 1),
    "connectivity 0": number(GRAPH + 8, "<Q", 0),
    "connectivity 2^40": number(GRAPH + 8, "<Q", 2**40),
    "another connectivity below": number(GRAPH + 16, "<Q", 64),
    "level 2^62": number(GRAPH + 24, "<Q", 2**62),
    "a level more": number(GRAPH + 24, "<Q", 9),
    "a start that is not there": number(GRAPH + 32, "<Q", HELD),
    "a start at 2^63": number(GRAPH + 32, "<Q", 2**63),
    "a slot of level 30000": number(LEVELS, "<h", 30000),
    "a slot of level -1": number(LEVELS, "<h", -1),
    "a node of another level": node(5, 8, "<h", 3),
    "the key of another": node(5, 0, "<Q", 4 ^ FLIP),
    "the key that usearch keeps": node(5, 0, "<Q", 2**64 - 1),
    "2^32 - 1 neighbours": node(5, 10, "<I", 2**32 - 1),
    "33 neighbours": node(5, 10, "<I", 33),
    "a neighbour that is not there": node(5, 14, "<I", HELD),
    "a neighbour at 2^32 - 1": node(5, 14, "<I", 2**32 - 1),
    "an id that the home does not have": node(5, 0, "<Q", 777 ^ FLIP),
    "NaN in a vector": number(8 + 2 * DIM * 3, "<H", 0x7E00),
    "infinity in a vector": number(8 + 2 * DIM * 3 + 8, "<H", 0xFC00),
    "another number in a vector": body(lambda own: raw.flip(own, 8 * 40 + 2), "^less$|^whole$", forged=True),
    "vectors of zeros": body(lambda own: own[:8] + bytes(HEAD - 8) + own[HEAD:], "^less$", forged=True),
    "no neighbours at all": body(
        lambda own: own[:NODES] + b"".join(own[at : at + 10] + bytes(132) for at in range(NODES, len(own), 142)),
        "^whole$",
    ),
}


def scribble(place: Place, seed: int) -> None:
    """Other bytes in usearch's part, above all in its graph, behind a right digest."""
    random = Random(seed)
    own, about = parts_of(file_of(place).read_bytes())
    changed = bytearray(own)
    for _ in range(random.choice((1, 1, 3))):
        at = random.randrange(HEAD if random.random() < 0.9 else 0, len(changed))
        changed[at] = random.choice((0, 255, random.randrange(256), changed[at] ^ 1 << random.randrange(8)))
    file_of(place).write_bytes(joined(bytes(changed), about))


for seed in range(40):
    CASES[f"scribble {seed}"] = Case(partial(scribble, seed=seed), "^whole$|^less$", forged=True)


@pytest.mark.parametrize("name", CASES)
def test_index_file(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
