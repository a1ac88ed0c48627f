"""A stream that may read some sources receives nothing of others, however it asks and whoever asks beside it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3runtime.config.where import in_sources
from m3runtime.documents.reference import Place
from m3runtime.retrieval.restriction import Restriction
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Changes
from tests.core.recalling import TEXTS, WORDS, open_runtime

SOURCES = {id: (f"s{id % 3}", f"t{id % 5}") if id % 4 == 0 else (f"s{id % 3}",) for id in range(len(TEXTS))}
"""The sources of each reference: one, or two."""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with open_runtime(tmp_path_factory.mktemp("restricted") / "bank", lookahead_tokens=0) as opened:
        places = {id: tuple(Place(name, 0, 1) for name in names) for id, names in SOURCES.items()}
        opened.bank.home.change(Changes(places=places))
        yield opened


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
sources = st.frozensets(st.sampled_from(["s0", "s1", "s2", "t0", "t4", "none"]), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts, sources=sources, memories=st.none() | st.integers(0, 4), floor=st.none() | st.floats(-1, 1))
def test_a_recall_chooses_the_best_of_what_it_may_read(
    runtime: Runtime, text: str, sources: frozenset[str], memories: int | None, floor: float | None
) -> None:
    embedder = runtime.retriever.embedder
    allowed = [id for id, names in SOURCES.items() if not sources.isdisjoint(names)]
    scores = (
        embedder.embed_references([TEXTS[id] for id in allowed]) @ embedder.embed_queries([text])[0] if allowed else []
    )
    best = sorted((round(float(score), 5) for score in scores), reverse=True)[
        : min(3, 3 if memories is None else memories)
    ]
    best = [score for score in best if score >= (-1 if floor is None else floor)]
    restriction = Restriction(memories, floor, in_sources(sources))
    with runtime.stream(restriction=restriction) as stream:
        stream.hint(text)
        recalled = stream.recall(text)
        assert set(recalled.ids) <= set(allowed)
        if floor is None or not any(abs(floor - float(score)) < 1e-4 for score in scores):
            assert recalled.scores == pytest.approx(best, abs=1e-4)
        assert [match.id for match in runtime.search([text], restriction=restriction)[0]] == list(recalled.ids)


def test_streams_of_several_threads_share_searches_and_no_memories(runtime: Runtime) -> None:
    def ask(number: int) -> int:
        mine = f"s{number % 3}"
        with runtime.stream(restriction=Restriction(where=in_sources([mine]))) as stream:
            strange = 0
            for place in range(25):
                text = WORDS[(number + place) % len(WORDS)]
                stream.hint(text)
                recalled = stream.recall(text)
                assert len(recalled) == 3
                strange += sum(mine not in SOURCES[id] for id in recalled.ids)
            return strange

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(24))) == 0


def test_one_call_has_streams_with_and_without_restriction(runtime: Runtime) -> None:
    with runtime.stream() as free, runtime.stream(restriction=Restriction(where=in_sources(["t4"]))) as bound:
        both = runtime.recall([free, bound], ["lamp", "lamp"])
        (alone,) = runtime.search(["lamp"])
    assert both[0].ids == tuple(match.id for match in alone)
    assert all("t4" in SOURCES[id] for id in both[1].ids)
    assert both[1].ids


def test_a_source_that_was_forgotten_gives_nothing_at_the_next_recall(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank") as runtime:
        runtime.bank.home.change(
            Changes(places={0: (Place("gone", 0, 1),), 1: (Place("gone", 0, 1), Place("kept", 0, 1))})
        )
        with runtime.stream(restriction=Restriction(where=in_sources(["gone"]))) as stream:
            assert set(stream.recall("lamp").ids) == {0, 1}
            runtime.forget([0])
            assert set(stream.recall("lamp").ids) == {1}
            runtime.bank.home.change(Changes(places={1: (Place("kept", 0, 1),)}))
            assert stream.recall("lamp").ids == ()
        assert 1 in runtime.retriever.index.ids()
