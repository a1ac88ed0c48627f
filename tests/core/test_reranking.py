"""A reranker orders what a search found. It reads each text once for a question, on the hint if there was one."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import ConfigError
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.query import Query
from m3runtime.retrieval.reranking import Reranking
from m3runtime.runtime import Runtime
from m3runtime.testing.reranker import MakeReranker, RerankerContract
from tests.core.recalling import TEXTS, open_runtime
from tests.end_to_end.rerankers import SharedWords


class TestSharedWords(RerankerContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_reranker() -> MakeReranker:
        return lambda: SharedWords("words")


def reranking(texts: Sequence[str], candidates: int = 20) -> tuple[Reranking, SharedWords]:
    reranker = SharedWords("words")
    return Reranking(
        reranker, lambda ids: {id: Reference(texts[id], 1) for id in ids if texts[id]}, candidates
    ), reranker


def matches(count: int) -> list[Match]:
    return [Match(id, 0.9 - id / 100) for id in range(count)]


@given(st.lists(st.text("abc ", max_size=8), max_size=12), st.integers(1, 15), st.text("abc ", max_size=8))
def test_matches_change_places_and_keep_the_scores_of_places(texts: list[str], candidates: int, question: str) -> None:
    ordered, reranker = reranking(texts, candidates)
    before = matches(len(texts))
    after = ordered.ordered(question, before)
    assert [one.score for one in after] == [one.score for one in before]
    assert sorted(one.id for one in after) == [one.id for one in before]
    assert after[candidates:] == before[candidates:]
    known = [one.id for one in after[:candidates] if texts[one.id]]
    judged = reranker.score(question, [texts[id] for id in known]).tolist()
    assert judged == sorted(judged, reverse=True)
    assert [one.id for one in after[:candidates]][: len(known)] == known  # what is forgotten comes last


def test_a_text_is_read_under_its_heading() -> None:
    reranker = SharedWords("words")
    references = {0: Reference("It burns oil.", 4, "The bakery"), 1: Reference("It burns oil.", 4, "The lamp")}
    ordered = Reranking(reranker, lambda ids: {id: references[id] for id in ids}, 5)
    assert [one.id for one in ordered.ordered("the lamp", matches(2))] == [1, 0]


def test_a_pair_is_read_once_by_all_threads() -> None:
    ordered, reranker = reranking([f"text {number}" for number in range(30)], 30)
    start = threading.Barrier(4)

    def ask(first: int) -> None:
        start.wait()
        ordered.ordered("text 7", matches(30)[first:])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, (0, 5, 10, 0)))
    assert len(reranker.read) == len(set(reranker.read)) == 30


def reranked(path: Path, **recall: object) -> tuple[Runtime, SharedWords]:
    reranker = SharedWords("words")
    runtime = open_runtime(path, **recall)
    runtime.retriever.reranking = Reranking(reranker, runtime._loader.references, 8)
    return runtime, reranker


def test_a_recall_takes_the_order_of_the_reranker(tmp_path: Path) -> None:
    runtime, _ = reranked(tmp_path / "bank")
    with runtime, runtime.stream() as stream:
        question = Query("lamp harbour", answers="ferry ferry")
        (plain,) = runtime.search(["lamp harbour"])
        recalled = stream.recall(question)
        assert recalled.ids != tuple(match.id for match in plain)
        assert "ferry" in recalled.references[0].text
        assert list(recalled.scores) == pytest.approx([match.score for match in plain])
        assert [match.id for match in runtime.search([question])[0]] == list(recalled.ids)


def test_the_hint_reads_for_the_recall(tmp_path: Path) -> None:
    runtime, reranker = reranked(tmp_path / "bank", lookahead_tokens=0)
    with runtime, runtime.stream() as stream:
        stream.hint(Query("lamp", answers="ferry"))
        runtime.background.drain()
        read = list(reranker.read)
        assert len(read) == 8
        first = stream.recall(Query("lamp", answers="ferry"))
        assert reranker.read == read
        stream.recall(Query("winter monday", answers="ferry"))  # the next chunk of the answer
        assert len(read) < len(reranker.read)
        assert len(set(reranker.read)) == len(reranker.read)
        assert stream.recall(Query("lamp", answers="ferry")).ids == first.ids


def test_a_chunk_is_judged_by_its_question_and_a_message_by_its_conversation() -> None:
    assert Query.of("lamp").question == "lamp"
    assert Query("chunk", ("who?",), (0.5,), answers="who?").question == "who?"
    assert Query.following("who made it?", ["and the colour?", "the lamp"], 0.8).question == (
        "the lamp\nand the colour?\nwho made it?"
    )


def config(reranker: str) -> Config:
    return Config.model_validate(
        {
            "bank": "bank",
            "model": {"path": "given"},
            "embedder": {"path": "given"},
            "recall": {"reranker": {"kind": reranker, "path": "words", "weight": 2, "candidates": 30}},
        }
    )


def test_a_reranker_is_made_of_the_configuration(tmp_path: Path) -> None:
    device = torch.device("cpu")
    made = assembly.open_reranker(config("tests.end_to_end.rerankers:SharedWords"), device)
    assert isinstance(made, SharedWords)
    assert made.weight == 2
    with pytest.raises(ConfigError, match=r"recall\.reranker"):
        assembly.open_reranker(config("tests.end_to_end.embedders:HashedWords"), device)


def test_the_runtime_closes_it(tmp_path: Path) -> None:
    runtime, reranker = reranked(tmp_path / "bank")
    runtime.search([TEXTS[0]])
    runtime.close()
    runtime.close()
    assert reranker.closed == 1
