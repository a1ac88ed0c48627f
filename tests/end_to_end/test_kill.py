"""``m3 write`` is killed or interrupted at any moment. What is left is whole, and writing again completes it."""

import itertools
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from m3runtime.errors import BankMissingError
from m3runtime.writing.encoding import GROUP
from tests.end_to_end.commands import Contents, Place, records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery, errors

pytestmark = pytest.mark.long

COUNT = 3 * GROUP + 7
CORPUS = records(f"Keeper {number} lit it on day {number * 37 % 1000}." for number in range(COUNT))
PHASES = ("reading", "creation", "commits", "codec", "reencoding", "compacting", "index")


@dataclass(frozen=True)
class Undisturbed:
    """A write that nobody disturbed."""

    contents: Contents
    sampled: int
    """The number of references that a codec was trained on. They were in int8 until they were encoded anew."""
    phases: dict[str, range]
    """The moments of each phase."""


@pytest.fixture
def places(tmp_path: Path, new_place: NewPlace) -> Iterator[Place]:
    """New places of the same corpus, without end."""
    return (prepared(new_place(tmp_path / str(number))) for number in itertools.count())


def prepared(place: Place) -> Place:
    place.configure(
        memory={"layers": [0, 2]},
        codec={"kind": "product", "key_bytes": 2, "value_bytes": 2, "scope": "layer", "sample_tokens": 1250},
        embedder={"dim": 32},
    )
    place.text("corpus.jsonl", CORPUS)
    return place


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    place = prepared(new_place(tmp_path_factory.mktemp("undisturbed")))
    code, said = nursery.run(place, None)
    assert code == 0, errors(place)
    begins, end, late = said
    assert late == [], "the nursery is there to have imported and compiled that"
    begins = {name: moment for name, moment in begins.items() if name in PHASES}
    assert list(begins) == list(PHASES)
    bounds = [*begins.values(), end]
    report = json.loads((place.folder / "stdout").read_text())
    sampled = report["reencoded"] + report["left"]
    assert sampled > 2 * report["left"]
    return Undisturbed(place.contents(), sampled, {name: range(*bounds[i : i + 2]) for i, name in enumerate(PHASES)})


def check(place: Place, undisturbed: Undisturbed) -> int:
    """Fail unless what an interrupted writer left is a beginning of the whole. Returns how much is there."""
    try:
        left = place.contents()
    except BankMissingError:
        assert not (place.bank / "home").exists()
        return 0
    whole, sampled = undisturbed.contents, undisturbed.sampled
    count = len(left.references)
    assert count in {*range(0, sampled, GROUP), *range(sampled, COUNT, GROUP), COUNT}
    assert left.manifest == whole.manifest or (json.loads(left.manifest)["planned"] and count <= sampled)
    assert left.blocks.keys() == left.references.keys() == left.embeddings.keys()
    is_final = {id: whole.blocks.get(id) == block for id, block in left.blocks.items()}
    assert all(id < sampled for id, final in is_final.items() if not final), "only a block in int8 is encoded anew"
    assert {_embedded(left, id) for id in left.blocks} <= {_embedded(whole, id) for id in whole.blocks}
    assert all(left.references[id] == whole.references[id] for id, final in is_final.items() if final)
    assert left.next_id == (max(left.blocks) + 1 if left.blocks else 0)
    # Whatever became of the index: it is in line with the home.
    found = place.m3("search", "Keeper 3 lit it", "--json").json
    assert len(found) == min(5, count)
    return count


def _embedded(contents: Contents, id: int) -> tuple[str, bytes]:
    return contents.references[id].text, contents.embeddings[id]


def check_completed(place: Place, nursery: Nursery, undisturbed: Contents, known: int) -> None:
    code, _ = nursery.run(place)
    assert code == 0, errors(place)
    report = json.loads((place.folder / "stdout").read_text())
    assert (report["known"], report["written"]) == (known, COUNT - known)
    assert place.contents() == undisturbed
    assert not (place.bank / "training").exists()
    third = next(id for id, one in undisturbed.references.items() if one.text.startswith("Keeper 3 "))
    assert place.m3("search", "Keeper 3 lit it on day 111", "-k", 1, "--json").json[0]["id"] == third


def kill_and_complete(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed, kills: dict[str, int], seed: int
) -> None:
    random, killed = Random(seed), 0
    for phase, count in kills.items():
        for _ in range(count):
            place = next(places)
            known = 0
            # Sometimes the second try is killed as well.
            for moments in random.choice([[phase], [phase, phase]]):
                moment = random.choice(undisturbed.phases[moments])
                code, _ = nursery.run(place, moment, delay=random.random() ** 3 * 0.1)
                killed += code == -signal.SIGKILL
                assert code in (0, -signal.SIGKILL), errors(place)
                left = check(place, undisturbed)
                assert left >= known
                known = left
            check_completed(place, nursery, undisturbed.contents, known)
    assert killed >= sum(kills.values()) // 2


def test_killed_at_any_moment(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = dict.fromkeys(("codec", "creation", "commits", "reencoding", "compacting", "index"), 1)
    kill_and_complete(nursery, places, undisturbed, kills, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_many_moments(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = {"reading": 2, "codec": 8, "creation": 10, "commits": 15, "reencoding": 15, "compacting": 10, "index": 5}
    kill_and_complete(nursery, places, undisturbed, kills, seed=2)


def interrupt_and_complete(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed, moments: list[int], delay: float | None = 0
) -> None:
    for moment in moments:
        place = next(places)
        code, _ = nursery.run(place, moment, signal_number=signal.SIGINT, delay=delay)
        assert (code, errors(place)) == (130, "m3: interrupted; nothing is half-written\n")
        assert (place.folder / "stdout").read_text() == ""
        known = check(place, undisturbed)
        check_completed(place, nursery, undisturbed.contents, known)


def test_interrupted_by_ctrl_c(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    random = Random(3)
    moments = [random.choice(undisturbed.phases[phase]) for phase in ("reading", "codec", "commits")]
    interrupt_and_complete(nursery, places, undisturbed, moments)


def test_interrupted_where_python_cannot_raise(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed
) -> None:
    random = Random(4)
    moments = [random.choice(undisturbed.phases[phase]) for phase in ("reading", "codec")]
    interrupt_and_complete(nursery, places, undisturbed, moments, delay=None)
