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

COUNT = 5 * GROUP + 7
CORPUS = records(f"Keeper {number} lit it on day {number * 37 % 1000}." for number in range(COUNT))
PHASES = ("reading", "creation", "commits", "codec", "index")


@dataclass(frozen=True)
class Undisturbed:
    """A write that nobody disturbed."""

    contents: Contents
    phases: dict[str, range]
    """The moments of each phase."""


@pytest.fixture
def places(tmp_path: Path, new_place: NewPlace) -> Iterator[Place]:
    """New places of the same corpus, without end."""
    return (prepared(new_place(tmp_path / str(number))) for number in itertools.count())


def prepared(place: Place) -> Place:
    place.configure(
        memory={"layers": [0, 2]},
        codec={"kind": "product", "key_bytes": 2, "value_bytes": 2, "scope": "layer", "sample_tokens": 2500},
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
    return Undisturbed(place.contents(), {name: range(*bounds[i : i + 2]) for i, name in enumerate(PHASES)})


def sample_of(whole: Contents) -> int:
    """The number of references that a codec was trained on: their blocks come first, and are of another codec."""
    codecs = [block[40:48] for _, block in sorted(whole.blocks.items())]
    assert codecs[0] != codecs[-1]
    return next(place for place, codec in enumerate(codecs) if codec != codecs[0])


def check(place: Place, undisturbed: Contents) -> int:
    """Fail unless what an interrupted writer left is a beginning of the whole. Returns how much is there."""
    try:
        left = place.contents()
    except BankMissingError:
        assert not (place.bank / "home").exists()
        return 0
    count = left.next_id
    sampled = sample_of(undisturbed)
    assert count in {*range(0, sampled, GROUP), *range(sampled, COUNT, GROUP), COUNT}
    assert left.manifest == undisturbed.manifest or (json.loads(left.manifest)["planned"] and count <= sampled)
    for mine, whole in (
        (left.blocks, undisturbed.blocks),
        (left.references, undisturbed.references),
        (left.embeddings, undisturbed.embeddings),
    ):
        assert list(mine) == list(range(count))
        assert mine.items() <= whole.items()  # type: ignore[operator]
    # Whatever became of the index: it is in line with the home.
    found = place.m3("search", "Keeper 3 lit it", "--json").json
    assert len(found) == min(5, count)
    return count


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
                left = check(place, undisturbed.contents)
                assert left >= known
                known = left
            check_completed(place, nursery, undisturbed.contents, known)
    assert killed >= sum(kills.values()) // 2


def test_killed_at_any_moment(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = {"codec": 2, "creation": 2, "commits": 3, "index": 1}
    kill_and_complete(nursery, places, undisturbed, kills, seed=1)


@pytest.mark.slow
def test_killed_at_many_moments(nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed) -> None:
    kills = {"reading": 2, "codec": 8, "creation": 10, "commits": 15, "index": 5}
    kill_and_complete(nursery, places, undisturbed, kills, seed=2)


def interrupt_and_complete(
    nursery: Nursery, places: Iterator[Place], undisturbed: Undisturbed, moments: list[int], delay: float | None = 0
) -> None:
    for moment in moments:
        place = next(places)
        code, _ = nursery.run(place, moment, signal_number=signal.SIGINT, delay=delay)
        assert (code, errors(place)) == (130, "m3: interrupted; nothing is half-written\n")
        assert (place.folder / "stdout").read_text() == ""
        known = check(place, undisturbed.contents)
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
