"""The laws of the places of references, and of the states of their sources."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.errors import InputError
from m3runtime.storage.home import Changes, Home
from m3runtime.testing.blocks import make_batch, make_blocks, make_embeddings, make_ids, make_reference
from m3runtime.testing.home_contents import check_whole, contents
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.threads import together
from m3runtime.testing.tier import UNKNOWN, check_read

STATE = SourceState(size=7, time=1_700_000_000_123_456_789, digest="0d" * 16, how="naïve \udcff")
SOURCE = make_reference(1).source
HERE, THERE = Place("here", 0, 9), Place("there/\udcff.md", 3, 12, {"page": "7", "title": "naïve"})


def at(id: int, *places: Place, heading: str = "") -> Reference:
    """The reference of an id elsewhere."""
    return replace(make_reference(id), places=places, heading=heading)


def stated(home: Home) -> None:
    """Commit 1, 2, 4 and 5, of which 1 and 4 are of `SOURCE`, and state how the sources were."""
    states = {make_reference(id).source: STATE for id in (1, 2)}
    home.commit(make_batch([1, 2, 4, 5]), changes=Changes(states=states))
    assert home.states() == states


class PlaceLaws(HomeLaws):
    """A reference has any number of places. The state of a source vouches that its members are as they were then."""

    def test_a_reference_is_a_member_of_all_its_sources(self, home: Home) -> None:
        places = (HERE, THERE, Place("here", 20, 29))
        home.commit(replace(make_batch([1, 2]), references=[at(1, *places), at(2, HERE)]))
        assert home.references(make_ids(1, 2)) == [at(1, *places), at(2, HERE)]
        assert home.ids_of("here").tolist() == [1, 2]
        assert home.ids_of(THERE.source).tolist() == [1]
        assert home.sources() == {"here": 2, THERE.source: 1}
        home.discard(make_ids(1))
        assert home.sources() == {"here": 1}
        assert home.ids_of(THERE.source).tolist() == []

    def test_a_text_is_remembered_once_under_each_heading(self, home: Home) -> None:
        text = make_reference(1).text
        headings = ["", "A", "A > B"]
        references = [at(1, HERE, heading=heading) for heading in headings]
        home.commit(replace(make_batch([1, 2, 3]), references=references))
        assert home.references(make_ids(1, 2, 3)) == references
        assert home.find([text] * 4, [*headings, "B"]) == [1, 2, 3, None]
        assert home.find([text]) == [1]
        assert home.find(["A" + text, text[1:]], ["", "A" + text[:1]]) == [None, None]
        with pytest.raises(InputError):
            home.commit(replace(make_batch([9]), references=[at(1, THERE, heading="A")]))
        home.discard(make_ids(2))
        assert home.find([text] * 2, ["", "A"]) == [1, None]

    def test_places_change_and_nothing_else(self, home: Home) -> None:
        home.commit(make_batch([1, 2, 4]))
        home.change(Changes({1: (HERE, THERE), 4: (make_reference(4).places[0], HERE)}))
        assert home.references(make_ids(1, 4)) == [at(1, HERE, THERE), at(4, make_reference(4).places[0], HERE)]
        assert home.sources() == {SOURCE: 1, make_reference(2).source: 1, "here": 2, THERE.source: 1}
        assert home.ids_of("here").tolist() == [1, 4]
        assert home.ids_of(SOURCE).tolist() == [4]
        home.change(Changes({id: make_reference(id).places for id in (1, 4)}))
        check_whole(home, make_ids(1, 2, 4))
        assert home.sources() == {SOURCE: 2, make_reference(2).source: 1}

    def test_a_reference_without_a_place_is_forgotten(self, home: Home) -> None:
        home.commit(make_batch([1, 2, 4]))
        home.change(Changes({1: (), UNKNOWN: ()}))
        assert home.ids().tolist() == [2, 4]
        assert not check_read(home, make_ids(1)).any()
        assert home.find([make_reference(1).text]) == [None]
        assert home.ids_of(SOURCE).tolist() == [4]
        check_whole(home, make_ids(2, 4))

    @pytest.mark.parametrize("add", ["commit", "catalogue"])
    def test_what_is_added_has_a_place(self, home: Home, add: str) -> None:
        batch = replace(make_batch([1]), references=[at(1)])
        adding: dict[str, Callable[[], None]] = {
            "commit": lambda: home.commit(batch),
            "catalogue": lambda: home.catalogue(batch.ids, batch.references, batch.embeddings),
        }
        with pytest.raises(InputError):
            adding[add]()
        assert home.next_id() == 0

    def test_states_are_kept_as_they_are(self, home: Home) -> None:
        stated(home)
        other = replace(STATE, time=0, digest="")
        home.change(Changes(states={"nothing remembered of it": other, SOURCE: None, "never heard of": None}))
        assert home.states() == {make_reference(2).source: STATE, "nothing remembered of it": other}
        assert "nothing remembered of it" not in home.sources()

    @pytest.mark.parametrize(
        "work",
        [
            lambda home: home.commit(make_batch([7])),
            lambda home: home.catalogue(make_ids(7), [make_reference(7)], make_embeddings(make_ids(7))),
            lambda home: home.commit(replace(make_batch([9]), references=[at(9, HERE, Place(SOURCE, 0, 1))])),
            lambda home: home.commit(make_batch([]), replacing=make_ids(1)),
            lambda home: home.discard(make_ids(4)),
            lambda home: home.change(Changes({1: (HERE,)})),
            lambda home: home.change(Changes({1: ()})),
            lambda home: home.change(Changes({1: (Place(SOURCE, 0, 1),)})),
            lambda home: home.change(Changes({2: (*make_reference(2).places, HERE, Place(SOURCE, 0, 1))})),
        ],
    )
    def test_a_source_that_gains_moves_or_loses_a_member_loses_its_state(
        self, home: Home, work: Callable[[Home], object]
    ) -> None:
        stated(home)
        work(home)
        assert SOURCE not in home.states()

    def test_nothing_else_takes_a_state(self, home: Home) -> None:
        stated(home)
        home.quarantine(1, "rotten")
        home.fill(make_ids(1), make_blocks(make_ids(1)))
        home.commit(make_batch([9]))  # of a third source
        home.change(Changes({1: (HERE, *make_reference(1).places)}))  # which stands in its source as before
        home.discard(make_ids(9, UNKNOWN))
        home.change(Changes({1: make_reference(1).places}))
        assert home.states() == {make_reference(id).source: STATE for id in (1, 2)}

    def test_a_source_changes_in_one_transaction(self, home: Home) -> None:
        """New, kept and moved members, what is gone, and the state: one commit does it all."""
        stated(home)
        changes = Changes({1: (), 4: (HERE, Place(SOURCE, 50, 60))}, {SOURCE: replace(STATE, size=8)})
        home.commit(make_batch([7]), changes=changes)
        assert home.ids().tolist() == [2, 4, 5, 7]
        assert home.ids_of(SOURCE).tolist() == [4, 7]
        assert home.states() == {SOURCE: replace(STATE, size=8), make_reference(2).source: STATE}
        check_whole(home, make_ids(2, 5, 7))

    @pytest.mark.parametrize("fault", ["unknown id", "text", "block"])
    def test_changes_that_are_refused_leave_nothing(self, home: Home, fault: str) -> None:
        stated(home)
        before = contents(home)
        changes = Changes({1: (HERE,), 2: ()}, {SOURCE: None, "new": STATE})
        batch = make_batch([7])
        match fault:
            case "unknown id":
                changes = replace(changes, places={**changes.places, UNKNOWN: (HERE,)})
            case "text":
                batch = replace(batch, references=[make_reference(5)])
            case "block":
                batch = replace(batch, blocks=make_blocks(make_ids(8)))
        with pytest.raises(InputError):
            home.commit(batch, changes=changes)
        assert contents(home) == before
        if fault == "unknown id":
            with pytest.raises(InputError):
                home.change(changes)
            with pytest.raises(InputError):
                home.catalogue(make_ids(7), [make_reference(7)], make_embeddings(make_ids(7)), changes=changes)
            assert contents(home) == before

    def test_a_reader_sees_a_change_as_a_whole_or_not_at_all(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))

        def work(number: int) -> None:
            for turn in range(20):
                place = Place(f"turn {turn}", 0, 1)
                if number == 0:
                    home.change(Changes({1: (place,), 2: (place,)}, {place.source: STATE}))
                else:
                    one, other = home.references(make_ids(1, 2))
                    assert one is not None
                    assert other is not None
                    assert one.source == other.source or "notes" in one.source
                    assert all(count == 2 for name, count in home.sources().items() if "turn" in name)
                    assert len(home.states()) <= 1

        together(3, work)
