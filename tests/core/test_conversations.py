"""Queries with context: a follow-up is searched by together with what it follows on, by hints as by recalls."""

from pathlib import Path

import numpy as np
import pytest

from m3runtime.lab.evaluation.conversations import FOLLOW_UPS, KINDS, make_conversations
from m3runtime.retrieval.query import Query, turn_weights
from tests.core.recalling import TEXTS, WordEmbedder, open_runtime


def test_without_weight_or_earlier_messages_a_text_is_searched_by_alone() -> None:
    assert Query.following("and it?", [], 0.8) == Query.of("and it?") == Query("and it?")
    assert Query.following("it", ["b"], 0.0) == Query("it")
    assert Query.following("it", ["b", " ", "a"], 0.5) == Query("it", ("b", "a"), turn_weight=0.5)
    assert len(Query.following("it", list("abcdefghijk"), 0.8).context) == 8
    assert Query.following("it", ["b"], 0.6).words == "it\nb"


def test_the_message_that_tells_the_subject_weighs_most() -> None:
    assert turn_weights([0.8], 0.8) == [1.0]
    assert turn_weights([0.2, 0.2, 0.8], 0.8) == pytest.approx([1 / 16, 0.8 / 16, 0.8])
    assert turn_weights([0.8, 0.8, 0.8], 0.8) == pytest.approx([1.0, 0.48, 0.24])
    assert turn_weights([0.0, -0.5], 0.8) == [1.0, 0.0]


def test_a_follow_up_recalls_what_the_conversation_is_about(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", lookahead_tokens=0) as runtime, runtime.stream() as stream:
        query = Query.following("who made it", ["and the colour", "walnut oil"], 0.8)
        (subject,) = runtime.search(["walnut oil"])
        assert runtime.search(["who made it"])[0][0] not in subject[:1]
        stream.hint(query)
        recalled = stream.recall(query)
        assert [match.id for match in runtime.search([query])[0]] == list(recalled.ids)
        assert recalled.ids[0] == subject[0].id
        changed = stream.recall(Query.following("lamp harbour", ["walnut oil"], 0.8))
        assert changed.ids[0] == runtime.search(["lamp harbour"])[0][0].id


def test_a_question_weighs_as_much_as_it_is_given(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank") as runtime:
        embedder = WordEmbedder()
        vector = np.array([1, 0.6]) @ embedder.embed_references(["monday", "walnut"])
        scores = embedder.embed_references(TEXTS) @ vector / np.linalg.norm(vector)
        (matches,) = runtime.search([Query("monday", ("walnut",), (0.6,))])
        assert [match.score for match in matches] == pytest.approx(sorted(scores.tolist(), reverse=True)[:3], abs=1e-3)


def test_queries_of_one_call_have_their_own_context(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank") as runtime:
        queries = ["lamp", Query("lamp", ("ferry",), (1.0,)), Query("lamp", ("stone",), (0.5,)), " "]
        together = runtime.search(queries, 3)
        assert together == [runtime.search([query], 3)[0] for query in queries]
        assert together[0] != together[1] != together[2]


def test_a_conversation_names_an_entity_only_when_the_subject_changes() -> None:
    texts, conversations = make_conversations(3, 40, 20)
    assert (texts, conversations) == make_conversations(3, 40, 20)
    assert len(texts) == 40
    assert len(conversations) == 20
    for turns in conversations:
        assert tuple(turn.kind for turn in turns) == KINDS
        assert len({turn.reference for turn in turns[:4]}) == len({turn.reference for turn in turns[4:]}) == 1
        names = [turn.text for turn in turns if turn.kind not in FOLLOW_UPS]
        for turn in turns:
            assert 0 <= turn.reference < 40
            assert (turn.text in names) == (turn.kind not in FOLLOW_UPS)
            assert "{" not in turn.text
