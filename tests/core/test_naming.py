"""A text that lacks what the question names loses a part of its score, wherever a recall chooses."""

from pathlib import Path

import pytest

from m3runtime.documents.names import names
from m3runtime.documents.reference import Reference
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.naming import Naming
from tests.core.recalling import open_runtime


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Who built the stone bridge at Ottmarsfeld?", {"ottmarsfeld"}),
        ("Which year? In what Lane, or lane 4b?", {"lane", "4b"}),
        ("the iPhone of Anna-Lena's friend", {"iphone", "anna", "lena"}),
        ("Brindolvar has a lamp. It burns: What?", set()),
        ("1431 was the year", {"1431"}),
        ("", set()),
    ],
)
def test_names(text: str, found: set[str]) -> None:
    assert names(text) == found


REFERENCES = {
    1: Reference("The bridge was built in 1431.", 1, "Lower Tarn"),
    2: Reference("The bridge of UPPER Tarn was built in 1502.", 1),
    3: Reference("A bakery.", 1),
}


def scored(question: str, *scores: float) -> list[Match]:
    naming = Naming(lambda ids: {id: REFERENCES[id] for id in ids if id in REFERENCES}, 0.2)
    return naming.scored(question, [Match(id, score, (9,)) for id, score in enumerate(scores, 1)])


def test_the_share_of_missing_names_is_subtracted() -> None:
    found = scored("When was the bridge of Upper Tarn built?", 0.7, 0.65, 0.5, 0.4)
    assert [one.id for one in found] == [2, 1, 4, 3]
    assert [one.score for one in found] == pytest.approx([0.65, 0.6, 0.4, 0.3])  # nobody remembers the fourth
    assert all(one.stands_for == (9,) for one in found)


def test_a_question_without_names_changes_nothing() -> None:
    assert [one.id for one in scored("When was it built?", 0.7, 0.65, 0.5)] == [1, 2, 3]


def test_scores_stay_cosines() -> None:
    assert [one.score for one in scored("And Brannoch?", -0.9, -0.95)] == [-1.0, -1.0]


def test_a_recall_finds_what_the_question_names(tmp_path: Path) -> None:
    question = "winter monday or the Ferry"
    with open_runtime(tmp_path / "bank") as plain:
        assert "ferry" not in plain.references([plain.search([question])[0][0].id])[0].text
    with open_runtime(tmp_path / "bank", names_weight=1.0) as runtime, runtime.stream() as stream:
        recalled = stream.recall(question)
        assert ["ferry" in one.text for one in recalled.references] == [True] * 3
        assert list(recalled.ids) == [match.id for match in runtime.search([question])[0]]
