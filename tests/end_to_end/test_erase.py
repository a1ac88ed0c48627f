"""``m3 forget --erase`` and ``m3 compact``: no byte of what was forgotten is left, also if they are killed."""

import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import Contents, Place
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery, errors

COUNT = 12
GONE = range(1, COUNT, 3)
ERASE = ("forget", *map(str, GONE), "--erase", "--json")


def tiers(folder: Path) -> list[dict[str, str]]:
    return [
        {"kind": "pinned", "capacity": "1MiB"},
        {"kind": "tests.end_to_end.tiers:KeptTier", "capacity": "1MiB", "path": str(folder / "kept")},
        {"kind": "lmdb"},
    ]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> Place:
    """A bank of which a tier that outlives the process holds everything, and a trace of how it came there."""
    place = new_place(tmp_path_factory.mktemp("warm"))
    place.configure(memory={"layers": [0]}, embedder={"dim": 32}, tiers=tiers(place.folder))
    words = Random(1)
    for number in range(COUNT):
        secret = " ".join(words.randbytes(5).hex() for _ in range(9))
        place.text(f"notes/{words.randbytes(6).hex()}.txt", f"Keeper {number} wrote {secret}.\n")
    assert place.m3("write", "notes", "--json").json["written"] == COUNT
    place.configure(recall={"trace": "trace.jsonl"})
    with Runtime.open(Config.load(place.file, environ={})) as runtime:
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
    assert (place.folder / "trace.jsonl").exists()
    return place


def copied(place: Place, folder: Path) -> Place:
    """A copy of a place, without the notes themselves."""
    shutil.copytree(place.folder, folder, ignore=shutil.ignore_patterns("notes"))
    copy = Place(folder)
    copy.configure(tiers=tiers(folder))
    return copy


def parts(contents: Contents, ids: set[int]) -> list[bytes]:
    """All bytes that are stored of some references: texts, names, blocks, and embeddings in home and index."""
    found = []
    for id in sorted(ids):
        reference: Reference = contents.references[id]
        vector = np.frombuffer(contents.embeddings[id], "<f4")
        found += [reference.text.encode(), *(Path(name).name.encode() for name in reference.sources)]
        found += [contents.blocks[id][48:], vector.tobytes(), vector.astype("<f2").tobytes()]
    return found


def left(place: Place, contents: Contents, gone: set[int]) -> set[bytes]:
    """Pieces of 10 bytes of forgotten references, and of no other, that a file in a place has."""
    kept = b"\n".join(parts(contents, contents.references.keys() - gone))
    pieces = {part[at : at + 10] for part in parts(contents, gone) for at in range(0, len(part) - 9, 3)}
    pieces = {piece for piece in pieces if len({*piece}) > 6 and piece not in kept}
    assert len(pieces) > 40 * len(gone)
    files = [file.read_bytes() for file in place.folder.rglob("*") if file.is_file()]
    return {piece for piece in pieces if any(piece in file for file in files)}


def test_forgetting_leaves_bytes_and_erasing_does_not(warm: Place, tmp_path: Path) -> None:
    place, contents = copied(warm, tmp_path / "place"), warm.contents()
    assert place.m3(*ERASE[:-2], "--json").json == {"forgotten": list(GONE)}
    assert left(place, contents, {*GONE})
    report = place.m3("compact", "--json").json
    assert report["erased"]["memories"] == len(GONE)
    assert report["freed_bytes"] > 0
    assert not left(place, contents, {*GONE})
    assert place.m3("forget", "0", "--erase").out == "1 memories forgotten and erased\n"
    assert not left(place, contents, {0, *GONE})
    facts = place.m3("inspect", "--json").json
    assert [one["memories"] for one in facts["erasures"]] == [len(GONE), 1]
    assert facts["erasing"] is False
    assert f"  {facts['erasures'][0]['at']}: {len(GONE)} memories\n" in place.m3("inspect").out
    assert place.m3("compact").out.startswith("0 forgotten or replaced memories erased; ")
    assert place.m3("verify", "--json").json["clean"]
    assert set(place.contents().references) == set(range(COUNT)) - {0, *GONE}


def test_a_process_that_reads_meanwhile_goes_on(warm: Place, nursery: Nursery, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "place")
    with Runtime.open(Config.load(place.file, environ={}), read_only=True) as runtime:
        done = nursery.m3(place, *ERASE)
        assert done.json["forgotten"] == list(GONE)
        assert runtime.references([0, 1, 2])[1] is None
        assert runtime.references([0])[0] == warm.contents().references[0]
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT - len(GONE)


def test_a_tier_that_fails_leaves_the_erasure_begun(warm: Place, tmp_path: Path) -> None:
    place, contents = copied(warm, tmp_path / "place"), warm.contents()
    kept = place.folder / "kept"
    stubborn = {"kind": "tests.end_to_end.tiers:StubbornTier", "capacity": "1MiB", "path": str(kept)}
    place.configure(tiers=[stubborn, {"kind": "lmdb"}])
    place.text("kept/stubborn", "")
    failed = place.m3(*ERASE)
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("m3: tier kept failed, and may hold what was forgotten; mend it")
    assert place.m3("inspect", "--json").json["erasing"] is True
    assert left(place, contents, {*GONE})
    (kept / "stubborn").unlink()
    assert place.m3("compact", "--json").json["erased"]["memories"] == len(GONE)
    assert not left(place, contents, {*GONE})


def test_what_killed_processes_left_is_removed(warm: Place, tmp_path: Path) -> None:
    place, contents = copied(warm, tmp_path / "place"), warm.contents()
    shutil.copy(place.bank / "index", place.bank / f".index.{'0' * 16}.tmp")
    (place.bank / "training").mkdir()
    shutil.copy(place.bank / "home" / "data.mdb", place.bank / "training" / "step")
    assert place.m3(*ERASE).code == 0
    assert not left(place, contents, {*GONE})


def kill(nursery: Nursery, warm: Place, folder: Path, count: int) -> None:
    """Kill ``m3 forget --erase`` at moments of all its phases, and let one command after the other finish it."""
    contents = warm.contents()
    place = copied(warm, folder / "undisturbed")
    code, (phases, end, _) = nursery.run(place, None, arguments=ERASE)
    assert code == 0, errors(place)
    assert not left(place, contents, {*GONE})
    begins = [phases[name] for name in ("begun", "forgetting", "index", "compacting", "recording")]
    random, outcomes = Random(8), list[bool]()
    for start, stop in zip(begins, [*begins[1:], end], strict=True):
        for moment in (random.randrange(start, stop) for _ in range(count)):
            place = copied(warm, folder / str(len(outcomes)))
            code, _ = nursery.run(place, moment, arguments=ERASE, delay=None)
            assert code == -signal.SIGKILL, errors(place)
            there = set(place.contents().references)
            gone = set(range(COUNT)) - there
            assert gone in (set(), {*GONE})
            was_begun = place.m3("inspect", "--json").json["erasing"]
            assert was_begun or not gone or not left(place, contents, gone)
            match len(outcomes) % 3:
                case 0:
                    finished = place.m3("compact")
                case 1:
                    finished = place.m3("write", place.text("more.txt", "The abbey has a new bell since Easter.\n"))
                case _:
                    finished = place.m3("forget", 0)
            assert finished.code == 0, finished.err
            facts = place.m3("inspect", "--json").json
            assert facts["erasing"] is False
            if gone:
                assert not left(place, contents, gone)
                assert facts["erasures"][0]["memories"] >= len(gone)
            assert place.m3("verify", "--json").json["clean"]
            outcomes.append(bool(gone))
    assert not outcomes[0]
    assert outcomes[-1]


def test_killed_at_any_moment(nursery: Nursery, warm: Place, tmp_path: Path) -> None:
    kill(nursery, warm, tmp_path, 1)


@pytest.mark.slow
def test_killed_at_many_moments(nursery: Nursery, warm: Place, tmp_path: Path) -> None:
    kill(nursery, warm, tmp_path, 15)
