"""Encoders in processes of their own, as the system sees them, and a configuration whose model they load fast."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.end_to_end.commands import Place

DIM = 32


def configured(folder: Path) -> Path:
    place = Place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place.configure(
        bank="./bank",
        model={"adapter": "tests.end_to_end.word_model:WordModel", "path": "words"},
        codec={"kind": "scalar"},
        embedder={"kind": "tests.end_to_end.embedders:HashedWords", "path": "hashed", "dim": DIM},
        tiers=[{"kind": "pinned", "capacity": "1MiB"}, {"kind": "lmdb"}],
    )
    return place.file


def children(parent: int) -> list[int]:
    """The encoders of a writer that have not ended."""
    found = list[int]()
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, tasks.read_text().split())
    return [child for child in found if b"encoders.process" in command(child)]


def command(process: int) -> bytes:
    """The command line of a process; nothing of one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def actors_of(driver: int) -> list[int]:
    """The actors of a cluster that a process started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])

    def ancestors(one: int) -> Iterator[int]:
        while one := parents.get(one, 0):
            yield one

    return [one for one in parents if b"ray::Encoder" in command(one) and driver in ancestors(one)]
