"""Conditions on metadata: their form, what they allow, and the ids that meet them while a bank changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3backends.lmdb.home import LmdbHome
from m3runtime.bank.members import Members
from m3runtime.config.where import conditions
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.restriction import Restriction, meets
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Changes
from tests.core.recalling import TEXTS, open_runtime

PLACES = {
    id: (
        Place(f"docs/{id % 4}.md", 0, 1, {"lang": ("en", "de", "fr")[id % 3], "year": str(2000 + id)}),
        *([Place("more/x.md", 0, 1, {"lang": "en"})] if id % 7 == 0 else []),
    )
    for id in range(len(TEXTS))
}


@pytest.mark.parametrize(
    ("where", "value", "allowed"),
    [
        ({"lang": "en"}, "en", True),
        ({"lang": "en"}, "english", False),
        ({"lang": ["en", "de"]}, "de", True),
        ({"lang": []}, "en", False),
        ({"lang": 7}, "7", True),
        ({"lang": {"at_least": 10}}, "9", False),
        ({"lang": {"at_least": 9, "at_most": 10}}, "9.5", True),
        ({"lang": {"at_least": 9}}, "many", False),
        ({"lang": {"at_least": "2024-02-01"}}, "2024-11-30", True),
        ({"lang": {"at_most": "2024-02-01"}}, "2024-11-30", False),
        ({"lang": {"prefix": "en-"}}, "en-GB", True),
        ({"lang": {"prefix": "en-"}}, "en", False),
    ],
)
def test_a_condition_allows(where: object, value: str, allowed: bool) -> None:
    assert meets(conditions(where), "a.md", {"lang": value}) is allowed
    assert not meets(conditions(where), "a.md", {})


@pytest.mark.parametrize(
    "where",
    ["lang", ["lang"], {"lang": None}, {"lang": True}, {"lang": {}}, {"lang": {"above": 1}}, {1: "a"}, {"": "a"}],
)
def test_what_is_no_condition_is_refused_in_a_line(where: object) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        conditions(where)


def test_all_conditions_are_of_one_place() -> None:
    both = conditions({"lang": "en", "source": "docs/"})
    assert meets(both, "docs/a.md", {"lang": "en"})
    assert not any(meets(both, source, data) for source, data in [("docs/a.md", {}), ("more/a.md", {"lang": "en"})])


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with open_runtime(tmp_path_factory.mktemp("where") / "bank", lookahead_tokens=0) as opened:
        opened.bank.home.change(Changes(places=PLACES))
        yield opened


wheres = st.fixed_dictionaries(
    {},
    optional={
        "lang": st.sampled_from(["en", "de", "none"]) | st.lists(st.sampled_from(["en", "de", "fr"]), max_size=2),
        "year": st.fixed_dictionaries({"at_least": st.integers(1999, 2040)}),
        "source": st.sampled_from(["docs/", "more", "docs/1.md"]) | st.just({"prefix": "docs/2"}),
    },
)


@given(text=st.sampled_from(TEXTS), where=wheres)
def test_a_recall_chooses_the_best_that_meets_the_conditions(runtime: Runtime, text: str, where: object) -> None:
    limits = conditions(where)
    allowed = [id for id, places in PLACES.items() if any(meets(limits, one.source, one.metadata) for one in places)]
    embedder = runtime.retriever.embedder
    best = [0.0]
    if allowed:
        best = (embedder.embed_references([TEXTS[id] for id in allowed]) @ embedder.embed_queries([text])[0]).tolist()
    with runtime.stream(restriction=Restriction(where=limits)) as stream:
        stream.hint(text)
        recalled = stream.recall(text)
    assert set(recalled.ids) <= set(allowed)
    assert recalled.scores == pytest.approx(sorted(best, reverse=True)[: len(recalled.ids)], abs=1e-3)
    assert len(recalled.ids) == min(3, len(allowed))


def test_the_conditions_of_the_configuration_hold_for_every_stream_and_search(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", where={"lang": "en"}) as runtime:
        runtime.bank.home.change(Changes(places=PLACES))
        wanted = {id for id, places in PLACES.items() if any(one.metadata["lang"] == "en" for one in places)}
        runtime.refresh()
        with (
            runtime.stream() as stream,
            runtime.stream(restriction=Restriction(where=conditions({"lang": "de"}))) as none,
        ):
            assert len(stream.recall("lamp")) == 3
            assert set(stream.state.leases) <= wanted
            assert not none.recall("lamp").ids
        assert {match.id for match in runtime.search(["lamp"], 1000)[0]} == wanted


def test_the_ids_follow_every_change_of_the_home(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path / "home", slot_bytes=64) as home:
        members = Members(home)
        stated = {"a.md": SourceState(1, 2, "3", "4"), "b.md": SourceState(1, 2, "3", "4")}

        def agree() -> None:
            ids = home.ids()
            for where in ({"lang": "en"}, {"lang": ["en", "de"], "source": "a.md"}, {"team": {"prefix": "l"}}):
                limits = conditions(where)
                passing = [
                    id
                    for id, one in zip(ids.tolist(), home.references(ids), strict=True)
                    if one and any(meets(limits, place.source, place.metadata) for place in one.places)
                ]
                assert members(limits).tolist() == passing

        def at(source: str, **metadata: str) -> tuple[Place, ...]:
            return (Place(source, 0, 1, metadata),)

        def add(id: int, places: tuple[Place, ...], **states: SourceState) -> None:
            vectors = torch.ones(1, 4).numpy()
            references = [Reference(f"text {id}", 1, places=places)]
            home.catalogue(as_ids([id]), references, vectors, changes=Changes(states=states))

        agree()
        for id in range(6):
            add(id, at("a.md" if id % 2 else "b.md", lang="en" if id < 4 else "de"))
        home.change(Changes(states=stated))
        agree()
        home.change(Changes({1: at("a.md", lang="de", team="law")}))  # a.md has no state now
        agree()
        home.change(Changes({1: at("b.md", lang="en", team="law")}, states=stated))
        agree()
        home.discard(as_ids([0]))
        agree()
        add(7, at("a.md", lang="en"), **{"a.md": stated["a.md"]})
        agree()
        home.change(Changes({7: (*at("a.md", lang="de"), *at("b.md", lang="en"))}))
        home.quarantine(3, "bad")
        agree()
