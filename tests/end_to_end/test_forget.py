"""``m3 forget`` is killed at any moment: what was forgotten is nowhere, and what was not is whole."""

import shutil
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery, errors
from tests.hostile import raw

COUNT = 12
GONE = range(1, COUNT, 3)
FORGET = ("forget", *map(str, GONE), "--json")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> Place:
    """A bank of which a tier that outlives the process holds everything."""
    place = new_place(tmp_path_factory.mktemp("warm"))
    place.configure(
        memory={"layers": [0]},
        tiers=[
            {"kind": "pinned", "capacity": "1MiB"},
            {"kind": "tests.end_to_end.tiers:KeptTier", "capacity": "1MiB", "path": str(place.folder / "kept")},
            {"kind": "lmdb"},
        ],
    )
    place.text("corpus.jsonl", records(f"Keeper {n} lit it on day {n * 37}." for n in range(COUNT)))
    assert place.m3("write", "corpus.jsonl", "--json").json["written"] == COUNT
    with Runtime.open(Config.load(place.file, environ={})) as runtime:
        assert len(runtime.fetch(range(COUNT), torch.float32)) == COUNT
    assert kept(place) == set(range(COUNT))
    return place


def copied(place: Place, folder: Path) -> Place:
    shutil.copytree(place.folder, folder)
    copy = Place(folder)
    copy.configure(
        tiers=[
            {"kind": "pinned", "capacity": "1MiB"},
            {"kind": "tests.end_to_end.tiers:KeptTier", "capacity": "1MiB", "path": str(folder / "kept")},
            {"kind": "lmdb"},
        ]
    )
    return copy


def kept(place: Place) -> set[int]:
    return {int(file.stem) for file in (place.folder / "kept").glob("*.block")}


def check(place: Place) -> bool:
    """Fail unless all of it was forgotten, everywhere, or nothing. Returns which."""
    with Runtime.open(Config.load(place.file, environ={})) as runtime:
        there = set(runtime.bank.home.ids().tolist())
        gone = set(range(COUNT)) - there
        assert gone in (set(), set(GONE))
        assert set(runtime.retriever.index.ids().tolist()) == there
        everything = np.arange(COUNT, dtype=np.uint64)
        assert set(np.flatnonzero(runtime.hierarchy.held(everything)).tolist()) <= there
        assert kept(place) <= there
        slots = torch.zeros(COUNT, runtime.hierarchy.slot_bytes, dtype=torch.uint8)
        found = runtime.hierarchy.read(everything, slots)
        assert set(np.flatnonzero(found).tolist()) == there
        for id in gone:
            assert id not in [match.id for match in runtime.search([f"Keeper {id} lit it"], COUNT)[0]]
    assert set(place.contents().texts) == there
    return bool(gone)


def test_it_is_gone_from_home_index_and_tiers(warm: Place, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "place")
    assert place.m3(*FORGET).json == {"forgotten": list(GONE)}
    assert kept(place) == set(range(COUNT)) - set(GONE)
    assert check(place)
    assert place.m3("verify", "--json").json["notes"] == []


def test_a_runtime_forgets_everywhere(warm: Place, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "place")
    with Runtime.open(Config.load(place.file, environ={})) as runtime:
        assert runtime.forget([*GONE, *GONE, 99]) == len(GONE)
        assert kept(place) == set(range(COUNT)) - set(GONE)
    assert check(place)


def test_what_a_tier_could_not_discard_is_said_and_discarded_later(warm: Place, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "place")
    stubborn = place.folder / "kept" / "1.block"
    stubborn.unlink()
    stubborn.mkdir()  # no file that can be removed
    result = place.m3(*FORGET)
    assert result.json == {"forgotten": list(GONE)}
    assert result.err == "tier kept failed: what it still holds is discarded when it is used again\n"
    assert 1 in kept(place)
    stubborn.rmdir()
    assert check(place)
    assert kept(place) == set(range(COUNT)) - set(GONE)


def test_quarantined_memories(warm: Place, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "place")
    for id in GONE:
        key = raw.key_of(id)
        raw.put(place, "blocks", key, raw.flip(raw.get(place, "blocks", key), 900))
    assert place.m3("verify", "--repair", "--no-model", "--json").code == 1
    assert place.m3("forget", "--quarantined", "--json").json == {"forgotten": list(GONE)}
    assert check(place)
    assert place.m3("verify", "--json").json["clean"]


def test_killed_at_any_moment(warm: Place, nursery: Nursery, tmp_path: Path) -> None:
    place = copied(warm, tmp_path / "undisturbed")
    code, (phases, end, _) = nursery.run(place, None, arguments=FORGET)
    assert code == 0, errors(place)
    assert check(place)
    begins = [phases[name] for name in ("forgetting", "tiers", "index")]
    random, outcomes = Random(8), []
    moments = [
        begins[0],
        *(random.randrange(*bounds) for bounds in zip(begins, [*begins[1:], end], strict=True) for _ in range(3)),
    ]
    for number, moment in enumerate(moments):
        place = copied(warm, tmp_path / str(number))
        code, _ = nursery.run(place, moment, arguments=FORGET, delay=None)
        assert code == -signal.SIGKILL, errors(place)
        outcomes.append(check(place))
        assert place.m3("verify", "--json").json["clean"]
    assert not outcomes[0]
    assert all(outcomes[-6:])  # the home had forgotten: so have all
