"""The index of words keeps the laws of `LexicalIndex`, and scores as Okapi BM25 does."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.memory.block import as_ids
from m3runtime.retrieval.bm25.index import Bm25Index
from m3runtime.retrieval.bm25.words import words
from m3runtime.retrieval.fusion import fused
from m3runtime.retrieval.lexical import LexicalIndex
from m3runtime.retrieval.match import Match
from m3runtime.testing.lexical import LexicalContract


class TestBm25(LexicalContract):
    def make_index(self) -> LexicalIndex:
        return Bm25Index()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The ferry, the FERRY!", ["the", "ferry", "the", "ferry"]),
        ("readFile", ["readfile", "read", "file"]),
        ("HTTPServer2", ["httpserver2", "http", "server", "2"]),
        ("snake_case", ["snake_case", "snake", "case"]),
        ("Ångström café", ["angstrom", "cafe"]),
        ("北京大学", ["北京", "京大", "大学"]),
        ("是 a是b", ["是", "a", "是", "b"]),
        ("ガギ", ["ガギ"]),
        ("E-4012/B", ["e", "4012", "b"]),
        ("ﬁne ①", ["fine", "1"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert list(words(text)) == found


texts = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=9).map(" ".join), max_size=30)


@given(texts=texts, asked=st.sets(st.sampled_from("abcxyz")), parts=st.integers(1, 5))
def test_scores_are_those_of_okapi(texts: list[str], asked: set[str], parts: int) -> None:
    index = Bm25Index()
    for part in range(parts):
        rows = range(part, len(texts), parts)
        index.add(as_ids(rows), [texts[row] for row in rows])
    counts = [Counter(text.split()) for text in texts]
    mean = sum(map(Counter.total, counts)) / max(1, len(texts))
    expected = {}
    for id, count in enumerate(counts):
        score = 0.0
        for word in asked & count.keys():
            having = sum(word in one for one in counts)
            rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            score += rarity * count[word] * 2.2 / (count[word] + 1.2 * (0.25 + 0.75 * count.total() / mean))
        if score:
            expected[id] = score
    ((ids, scores),) = index.search([" ".join(asked)], 100)
    assert dict(zip(ids.tolist(), scores.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)


def test_ranks_are_joined_and_scores_stay_in_order() -> None:
    nearest = [Match(id, 0.9 - id / 10) for id in range(4)]
    assert fused(nearest, ([0, 1, 2, 3], [0, 1, 2, 3]), 3) == nearest[:3]
    assert fused(nearest, ([0, 1, 2, 3], []), 9) == nearest
    joined = fused(nearest, ([0, 1, 2, 3], [7, 2]), 4)
    assert joined[0].id == 2  # both found it
    assert {one.id for one in joined[1:3]} == {0, 7}
    assert [one.score for one in joined] == [one.score for one in nearest]


def test_the_first_of_one_search_comes_before_what_both_find_late() -> None:
    nearest = [Match(id, 0.9 - id / 100) for id in range(30)]
    late = [*range(40, 59), 20]
    assert next(one.id for one in fused(nearest, (list(range(30)), late), 2)) == 0
    assert [one.id for one in fused(nearest, (list(range(30)), late), 4)][:2] == [0, 40]
