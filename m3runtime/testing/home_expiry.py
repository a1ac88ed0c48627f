"""The laws of expiry: the home lists each reference under the last day of each of its places."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.storage.home import Changes, Home
from m3runtime.testing.blocks import make_batch, make_embeddings, make_ids, make_reference
from m3runtime.testing.home_laws import HomeLaws

EARLY, LATE = "2026-12-31", "2027-01-31"


def until(day: str, source: str = "naïve/\udcff.md") -> Place:
    """A place with a last day."""
    return Place(source, 0, 9, {"page": "7", "expires": day})


def lasting(id: int, *places: Place) -> Reference:
    """The reference of an id in these places."""
    return replace(make_reference(id), places=places)


def listed(home: Home, before: str | None = None) -> dict[str, list[int]]:
    """What `Home.expiring` says."""
    found = home.expiring(before)
    assert list(found) == sorted(found)
    assert all(ids.dtype == np.uint64 for ids in found.values())
    return {day: ids.tolist() for day, ids in found.items()}


def some(home: Home) -> None:
    """Commit 300, which has two last days, 2 with one, and 7 with none; catalogue 301."""
    references = [lasting(300, until(LATE), until(EARLY, "b")), lasting(2, until(LATE)), make_reference(7)]
    home.commit(replace(make_batch([300, 2, 7]), references=references))
    home.catalogue(make_ids(301), [lasting(301, until(LATE))], make_embeddings(make_ids(301)))


class ExpiryLaws(HomeLaws):
    """What expires is listed by its last days, so that it can be found without reading every reference."""

    def test_references_are_listed_by_their_last_days(self, home: Home) -> None:
        some(home)
        assert listed(home) == {EARLY: [300], LATE: [2, 300, 301]}
        assert listed(home, LATE) == {EARLY: [300]}
        assert listed(home, EARLY) == {}
        home.quarantine(2, "rotten")
        assert listed(home)[LATE] == [2, 300, 301]

    @pytest.mark.parametrize(
        ("work", "left"),
        [
            (lambda home: home.discard(make_ids(2, 7)), {EARLY: [300], LATE: [300, 301]}),
            (lambda home: home.commit(make_batch([]), replacing=make_ids(300)), {LATE: [2, 301]}),
            (lambda home: home.change(Changes({300: ()})), {LATE: [2, 301]}),
            (lambda home: home.change(Changes({300: (until(LATE),)})), {LATE: [2, 300, 301]}),
            (lambda home: home.change(Changes({300: (until("2030-01-01"),)})), {LATE: [2, 301], "2030-01-01": [300]}),
            (lambda home: home.change(Changes({2: make_reference(2).places})), {EARLY: [300], LATE: [300, 301]}),
            (lambda home: home.change(Changes({7: (until(EARLY),)})), {EARLY: [7, 300], LATE: [2, 300, 301]}),
            (
                lambda home: home.commit(replace(make_batch([302]), references=[lasting(302, until(EARLY))])),
                {EARLY: [300, 302], LATE: [2, 300, 301]},
            ),
        ],
    )
    def test_the_list_follows_the_places(
        self, home: Home, work: Callable[[Home], object], left: dict[str, list[int]]
    ) -> None:
        some(home)
        work(home)
        assert listed(home) == left
        home.close()
        with self.open(self.place, read_only=True) as again:
            assert listed(again) == left

    def test_a_source_that_loses_its_state_keeps_its_last_day_and_tags(self, home: Home) -> None:
        some(home)
        state = SourceState(7, 8, "digest", "how", LATE, ("line 3 is bad",), (("lang", "en"), ("team", "law")))
        home.change(Changes(states={"b": state, until(LATE).source: replace(state, expires="", tags=())}))
        assert home.states()["b"] == state
        home.change(Changes({300: (until(LATE), until(LATE, "b"))}))
        assert home.states()["b"] == state.voided() != state
        home.commit(replace(make_batch([303]), references=[lasting(303, until(LATE, "b"))]))
        home.discard(make_ids(300, 303))
        assert home.states() == {"b": state.voided()}
        home.change(Changes(states={"b": None}))
        assert home.states() == {}

    def test_compaction_keeps_the_list(self, home: Home) -> None:
        some(home)
        home.compact()
        assert listed(home) == {EARLY: [300], LATE: [2, 300, 301]}
