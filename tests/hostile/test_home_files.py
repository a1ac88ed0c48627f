"""A home's files that are not what they should be: refused, or read as what they still are; nothing else is touched."""

import contextlib
import os
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import lmdb
import pytest

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.errors import M3Error
from tests.end_to_end.commands import Place
from tests.hostile.cases import Case, before, check, outcome
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

PAGE = 4096
REFUSED = "^refused: Bank(Missing|Format)?Error: "
ANY = f"{REFUSED}|^whole$|^missing|^less$"


def data_of(place: Place) -> Path:
    return place.bank / "home" / "data.mdb"


def change(place: Place, work: Callable[[bytes], bytes]) -> None:
    data_of(place).write_bytes(work(data_of(place).read_bytes()))


def changed(work: Callable[[bytes], bytes], expected: str = ANY) -> Case:
    return Case(partial(change, work=work), expected)


def number(at: int, kind: str, value: int, expected: str = ANY) -> Case:
    """Another number in both meta pages."""

    def work(data: bytes) -> bytes:
        new = bytearray(data)
        for page in (0, PAGE):
            struct.pack_into(kind, new, page + at, value)
        return bytes(new)

    return changed(work, expected)


def pages(order: Callable[[list[bytes]], list[bytes]], expected: str = ANY) -> Case:
    return changed(lambda d: b"".join(order([d[at : at + PAGE] for at in range(0, len(d), PAGE)])), expected)


def swapped(place: Place, seed: int) -> None:
    random = Random(seed)
    size = data_of(place).stat().st_size // PAGE
    one, other = random.sample(range(size), 2)

    def work(data: bytes) -> bytes:
        new = bytearray(data)
        new[one * PAGE : (one + 1) * PAGE], new[other * PAGE : (other + 1) * PAGE] = (
            data[other * PAGE : (other + 1) * PAGE],
            data[one * PAGE : (one + 1) * PAGE],
        )
        return bytes(new)

    change(place, work)


def scribbled(place: Place, seed: int) -> None:
    random = Random(seed)

    def work(data: bytes) -> bytes:
        new = bytearray(data)
        for _ in range(random.choice((1, 4, 64))):
            # The beginnings of pages, which LMDB follows, more often than the rest.
            at = random.randrange(len(new) // PAGE) * PAGE + random.randrange(random.choice((16, 64, PAGE)))
            new[at] = random.choice((0, 255, random.randrange(256)))
        return bytes(new)

    change(place, work)


def grown(place: Place, size: int) -> None:
    os.truncate(data_of(place), size)


def other_program(place: Place, named: bool) -> None:
    shutil.rmtree(place.bank / "home")
    (place.bank / "home").mkdir()
    with lmdb.open(str(place.bank / "home"), max_dbs=2) as env:
        db = env.open_db(b"blocks" if named else None)
        with env.begin(db=db, write=True) as txn:
            txn.put(b"version", b"1")


def replaced(place: Place, name: str, make: Callable[[Path], object]) -> None:
    path = place.bank / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def linked(path: Path, target: str) -> None:
    path.symlink_to(target)


def moved(place: Place, name: str) -> None:
    """It lies outside, and a link leads there, as of a bank that was moved to another drive."""
    shutil.move(place.bank / name, place.folder / "moved")
    (place.bank / name).symlink_to(place.folder / "moved")


CASES: dict[str, Case] = {
    "nothing done": changed(lambda data: data, "^whole$"),
    "empty": changed(lambda data: b""),
    "text": changed(lambda data: b"bank: ./bank\n", REFUSED),
    "zeros": changed(lambda data: bytes(len(data)), REFUSED),
    "ones": changed(lambda data: b"\xff" * len(data), REFUSED),
    "half a page": changed(lambda data: data[: PAGE // 2], REFUSED),
    "one page": changed(lambda data: data[:PAGE], REFUSED),
    "two pages": changed(lambda data: data[: 2 * PAGE], REFUSED),
    "three pages": changed(lambda data: data[: 3 * PAGE], REFUSED),
    "half of its pages": changed(lambda data: data[: len(data) // PAGE // 2 * PAGE], REFUSED),
    "a page less": changed(lambda data: data[:-PAGE]),
    "a byte less": changed(lambda data: data[:-1]),
    "a byte more": changed(lambda data: data + b"\0"),
    "twice": changed(lambda data: data * 2, "^whole$"),
    "1 TB of holes": Case(partial(grown, size=1 << 40), ANY),
    "without its first page": changed(lambda data: data[PAGE:], REFUSED),
    "the first meta page of zeros": changed(lambda data: bytes(PAGE) + data[PAGE:]),
    "the second meta page of zeros": changed(lambda data: data[:PAGE] + bytes(PAGE) + data[2 * PAGE :]),
    "pages in reverse": pages(lambda found: found[:2] + found[:1:-1]),
    "meta pages exchanged": pages(lambda found: [found[1], found[0], *found[2:]]),
    "every page the same": pages(lambda found: found[:2] + [found[2]] * (len(found) - 2)),
    "another magic": number(16, "<I", 0, REFUSED),
    "another version of LMDB": number(20, "<I", 2, REFUSED),
    "a map of 2^63 bytes": number(32, "<Q", 2**63),
    "a map of no bytes": number(32, "<Q", 0),
    "pages of 0 bytes": number(40, "<I", 0, REFUSED),
    "pages of 3 bytes": number(40, "<I", 3, REFUSED),
    "pages of 64 KiB": number(40, "<I", 1 << 16, REFUSED),
    "pages of 2^31 bytes": number(40, "<I", 2**31, REFUSED),
    "2^60 pages": number(136, "<Q", 2**60, REFUSED),
    "no pages": number(136, "<Q", 0),
    "transaction 2^64 - 1": number(144, "<Q", 2**64 - 1),
    "a root beyond the end": number(128, "<Q", 2**40, REFUSED),
    "a root that is a meta page": number(128, "<Q", 0, REFUSED),
    "a free list beyond the end": number(80, "<Q", 2**40),
    "another program's": Case(partial(other_program, named=False), REFUSED),
    "another program's with names like ours": Case(partial(other_program, named=True), REFUSED),
}
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a link to nowhere": partial(linked, target="nowhere"),
    "a link to itself": partial(linked, target="data.mdb"),
    "a link to a folder": partial(linked, target="/"),
    "a link to zeros without end": partial(linked, target="/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
}
for what, make in SPECIAL.items():
    CASES[f"data.mdb is {what}"] = Case(partial(replaced, name="home/data.mdb", make=make), REFUSED)
    CASES[f"the home is {what}"] = Case(partial(replaced, name="home", make=make), REFUSED)
    for file in ("lock.mdb", "verified", "writer.lock", "opening.lock"):
        CASES[f"{file} is {what}"] = Case(partial(replaced, name=f"home/{file}", make=make), ANY)
for file in ("home", "home/data.mdb"):
    CASES[f"{file} was moved, and linked"] = Case(partial(moved, name=file), "^whole$")
for seed in range(20):
    CASES[f"pages swapped {seed}"] = Case(partial(swapped, seed=seed), ANY)
for seed in range(60):
    CASES[f"scribble {seed}"] = Case(partial(scribbled, seed=seed), ANY)


@pytest.mark.parametrize("name", CASES)
def test_home_files(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)


# -- what lies outside --------------------------------------------------------------------------------------------

PLACES = (
    "home/data.mdb",
    "home/lock.mdb",
    "home/verified",
    "home/writer.lock",
    "home/opening.lock",
    "home",
    "home.unfinished",
    "index",
    "codec.safetensors",
)
TEXT = b"Somebody's letters.\n"


def lured(place: Place, which: tuple[str, str]) -> str:
    """Put a link to a file or folder outside where a bank's file is, and do all that writes to a bank."""
    name, kind = which
    outside = place.folder / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(TEXT)
    (outside / "folder" / "file").write_bytes(TEXT)
    replaced(place, name, partial(linked, target=str(outside / kind)))
    was = before(place)
    results = []
    for command in (
        ["inspect"],
        ["verify"],
        ["verify", "--repair"],
        ["forget", "0"],
        ["search", "owl"],
    ):
        result = place.m3(*command)
        assert result.code in (0, 1, 2), result
        assert "Traceback" not in result.err, result.err
        results.append(f"{command[0]} {result.code}")
    try:
        outcome(place, was, forged=True)
    except Exception as error:  # noqa: BLE001 - what it says is for other tests
        results.append(type(error).__name__)
    assert (outside / "file").read_bytes() == TEXT
    assert (outside / "folder" / "file").read_bytes() == TEXT
    assert sorted(path.name for path in outside.iterdir()) == ["file", "folder"]
    assert [path.name for path in (outside / "folder").iterdir()] == ["file"], list((outside / "folder").iterdir())
    return ", ".join(results)


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("name", PLACES)
def test_links_lead_no_writer_out_of_the_bank(nursery: Nursery, name: str, kind: str) -> None:
    ended = nursery.run("tests.hostile.test_home_files:lured", [name, kind])
    assert ended.how == "returned", ended.text


def made_anew(place: Place, kind: str) -> str:
    """Make a bank where a link to something outside is in place of what an interrupted making leaves."""
    outside = place.folder / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(TEXT)
    (outside / "folder" / "file").write_bytes(TEXT)
    config = Config.load(place.file, environ={})
    bank = assembly.open_bank(config, read_only=True)
    bank.close()
    shutil.rmtree(place.bank / "home")
    replaced(place, "home.unfinished", partial(linked, target=str(outside / kind)))
    with contextlib.suppress(M3Error):
        Bank.create(place.bank, assembly.open_home(config), bank.manifest, bank.codec).close()
    assert (outside / "file").read_bytes() == TEXT
    assert [path.name for path in (outside / "folder").iterdir()] == ["file"]
    assert sorted(path.name for path in outside.iterdir()) == ["file", "folder"]
    return ""


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_link_in_place_of_an_unfinished_home_leads_nobody_out(nursery: Nursery, kind: str) -> None:
    ended = nursery.run("tests.hostile.test_home_files:made_anew", kind)
    assert ended.how == "returned", ended.text
