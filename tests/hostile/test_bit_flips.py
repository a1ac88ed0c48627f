"""Bits flipped one at a time in every file of a bank: each flip is found out, or changes nothing that is delivered.

`make test-flips` flips 10,000 of them; a sample of those is flipped by every run of the tests.
"""

import faulthandler
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import lmdb
import numpy as np
import pytest

from m3runtime.bank.codecs import CODEC
from m3runtime.bank.index import INDEX
from m3runtime.errors import M3Error
from tests.end_to_end.commands import Place
from tests.hostile.banks import Delivered, differs, serve
from tests.hostile.cases import before
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

TARGETS = {
    "blocks": 30,
    "manifest": 5,
    "codec": 15,
    "index": 15,
    "data.mdb": 15,
    "data.mdb, its clock unchanged": 10,
    "heads of pages, the clock unchanged": 10,
}
"""Where bits are flipped, and how many of a hundred."""
HANG_S = 30
IN_ONE_PROCESS = 100
PAGE = 4096


def test_a_sample_of_bit_flips(nursery: Nursery, tmp_path: Path) -> None:
    table = flip_all(nursery, tmp_path, seeds=range(2))  # of a home with free pages, and of one without
    assert sum(sum(row.values()) for row in table.values()) == 2 * IN_ONE_PROCESS


@pytest.mark.flips
@pytest.mark.timeout(7200)
def test_ten_thousand_bit_flips(nursery: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = flip_all(nursery, tmp_path, seeds=range(100))
    with capsys.disabled():
        print("\n" + shown(table))  # noqa: T201 - what the figures are wanted for
    assert sum(sum(row.values()) for row in table.values()) == 10_000
    for row in table.values():
        assert row["refused"] + row["set apart"] + row["rebuilt"], "none of the flips there was found out"


def flip_all(nursery: Nursery, tmp_path: Path, seeds: range) -> dict[str, Counter[str]]:
    """How many flips ended how, in each file. Fails for one that harmed, and says which."""
    table: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    for seed in seeds:
        progress = tmp_path / f"flip-{seed}"
        case = "tests.hostile.test_bit_flips:flipped"
        ended = nursery.run(case, [seed, str(progress)], IN_ONE_PROCESS * HANG_S)
        at = progress.read_text() if progress.exists() else "the beginning"
        assert ended.how == "returned", f"seed {seed}, {at}: {ended.how} {ended.text}"
        for name, row in json.loads(ended.text).items():
            table[name].update(row)
    return table


def shown(table: dict[str, Counter[str]]) -> str:
    """The table as it stands in the documentation."""
    ends = ("refused", "set apart", "rebuilt", "harmless")
    lines = [["file", "flips", *ends]]
    lines += [[name, str(sum(row.values())), *(str(row[end]) for end in ends)] for name, row in table.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


# -- in a process of the nursery ----------------------------------------------------------------------------------


def flipped(place: Place, which: tuple[int, str]) -> str:
    """Flip so many bits one after the other, each put back; returns how they ended, as JSON."""
    seed, progress = which
    was = before(place)
    table: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    if seed % 2:
        compact(place)
    stored = spans(place)
    assert end_of(place, was) == "harmless"  # and the home is known to be whole from now on
    for name, file, bit in chosen(place, seed, stored):
        Path(progress).write_text(f"{name}: bit {bit % 8} of byte {bit // 8} of {file.name}")
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        flip(file, bit, keep_clock=name.endswith("clock unchanged"))
        try:
            table[name][end_of(place, was)] += 1
        finally:
            flip(file, bit, keep_clock=name.endswith("clock unchanged"))
        faulthandler.cancel_dump_traceback_later()
    assert end_of(place, was) == "harmless"
    return json.dumps(table)


def end_of(place: Place, was: Delivered) -> str:
    """Serve the bank. Raises `AssertionError` if anything is delivered that was not so before."""
    with rebuilds() as rebuilt:
        try:
            now = serve(place)
        except M3Error:
            return "refused"
    wrong = differs(was, now)
    assert wrong is None, wrong
    return "set apart" if now != was else "rebuilt" if rebuilt else "harmless"


@contextmanager
def rebuilds() -> Iterator[list[logging.LogRecord]]:
    """What is logged of an index that could not be used."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    logger = logging.getLogger("m3runtime")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def compact(place: Place) -> None:
    """Leave out the pages that are free, where a flip harms nobody."""
    with lmdb.Environment(str(data_of(place).parent), readonly=True) as env:
        env.copy(str(place.folder), compact=True)
    (place.folder / "data.mdb").replace(data_of(place))


def chosen(place: Place, seed: int, stored: dict[str, list[range]]) -> Iterator[tuple[str, Path, int]]:
    """What to flip: its name in `TARGETS`, the file and the bit."""
    random = Random(seed)
    files = {
        "blocks": data_of(place),
        "manifest": data_of(place),
        "codec": place.bank / CODEC,
        "index": place.bank / INDEX,
    }
    names = [name for name, share in TARGETS.items() for _ in range(share * IN_ONE_PROCESS // 100)]
    random.shuffle(names)
    for name in names:
        file = files.get(name, data_of(place))
        if name in stored:
            byte = random.choice(random.choice(stored[name]))
        elif name == "codec" and random.random() < 0.5:
            byte = random.randrange(1500)  # its header, a small part of it
        elif name.startswith("heads"):
            byte = random.randrange(file.stat().st_size // PAGE) * PAGE + random.randrange(48)
        else:
            byte = random.randrange(file.stat().st_size)
        yield name, file, 8 * byte + random.randrange(8)


def data_of(place: Place) -> Path:
    return place.bank / "home" / "data.mdb"


def spans(place: Place) -> dict[str, list[range]]:
    """Where blocks and the manifest lie in the home's file."""
    with lmdb.Environment(str(data_of(place).parent), readonly=True, max_dbs=16) as env:
        wanted = {"manifest": env.open_db(b"meta"), "blocks": env.open_db(b"blocks")}
        with env.begin(buffers=True) as txn:
            (start,) = (
                int(line.split("-")[0], 16)
                for line in Path("/proc/self/maps").read_text().splitlines()
                if line.endswith(str(data_of(place)))
            )
            # Where LMDB has them in its map: pages that are free now hold older copies of the same.
            return {name: [span(value, start) for _, value in txn.cursor(db)] for name, db in wanted.items()}


def span(value: memoryview, start: int) -> range:
    """The bytes of the file, mapped at ``start``, that a value takes."""
    first = np.frombuffer(value, np.uint8).ctypes.data - start
    return range(first, first + len(value))


def flip(file: Path, bit: int, *, keep_clock: bool) -> None:
    """Flip a bit of a file in place. A drive that rots leaves the time of the last change as it was."""
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))
    if keep_clock:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
