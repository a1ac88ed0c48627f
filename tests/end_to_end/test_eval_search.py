"""``m3 eval search`` and ``m3 eval conversations``: what is found, without a model and without a bank."""

import json
from pathlib import Path

import pytest

from m3runtime.errors import InputError
from m3runtime.lab.evaluation import corpora
from m3runtime.lab.evaluation.conversations import KINDS
from tests.end_to_end.commands import Place


@pytest.fixture
def pairs(place: Place) -> Place:
    lines = [
        {"text": f"The unit QX{number} stands in hall {number}.", "question": f"QX{number}?"} for number in range(9)
    ]
    place.text("units.jsonl", "".join(json.dumps(one) + "\n" for one in [*lines, {"text": "Nobody asks for this."}]))
    return place


@pytest.mark.slow
def test_kinds_of_search_are_compared(pairs: Place) -> None:
    sizes = ("--questions", 5, "--texts", 12)
    more = ("--pairs", "units.jsonl", "--out", "out", "--json")
    report = pairs.m3("eval", "search", *sizes, "--copies", 6, *more).json
    (table,) = report["tables"]
    rows = {(row[0], row[3]): row for row in table["rows"]}
    assert {corpus for corpus, _ in rows} == {"facts", "manual", "code", "units"}
    copied = {"dense, copies", "dense, copies once"}
    assert {kind for _, kind in rows} == {"dense", "lexical", "hybrid", "dense, names"} | copied
    for corpus, _ in rows:  # seven copies of the first fill the five places, unless they are recalled once
        first, fifth = (rows[corpus, "dense"][place]["value"] for place in (5, 4))
        assert [rows[corpus, kind][4]["value"] for kind in sorted(copied)] == [first, fifth]
    assert rows["units", "lexical"][1:3] == ["10", 5]
    assert rows["units", "lexical"][4]["value"] == 1.0
    assert len(report["summary"]) == 4
    assert len(report["results"]["facts"]["hybrid"]) == 5
    assert (pairs.folder / "out/report.md").exists()
    assert not pairs.bank.exists()

    refused = pairs.m3("eval", "floor", *sizes, *more)
    assert "units: no question is left that none of 10 texts answers; set --texts" in refused.err
    (table,) = pairs.m3("eval", "floor", "--questions", 5, "--texts", 6, *more).json["tables"]
    assert [row[0] for row in table["rows"][::3]] == ["facts", "manual", "code", "units"]
    assert all(row[4]["count"] == 5 for row in table["rows"])


def test_what_was_found_is_reranked(pairs: Place) -> None:
    reranker = ("--set", "recall.reranker.kind=tests.end_to_end.rerankers:SharedWords", "--set")
    sizes = ("--questions", 5, "--pairs", "units.jsonl", "--only-pairs", "--out", "out", "--json")
    report = pairs.m3("eval", "search", *sizes, *reranker, "recall.reranker.path=words").json
    kinds = ["dense", "lexical", "hybrid", "dense, names", "dense, reranked", "hybrid, reranked"]
    (table,) = report["tables"]
    assert [(row[0], row[3]) for row in table["rows"]] == [("units", kind) for kind in kinds]
    assert [row[5]["value"] for row in table["rows"][4:]] == [1.0, 1.0]  # each question is a word of its text alone
    (told,) = report["summary"]
    assert "dense, reranked less dense is" in told
    assert "hybrid, reranked less hybrid is" in told
    refused = pairs.m3("eval", "search", "--only-pairs", "--out", "out")
    assert "--only-pairs: name a file by --pairs" in refused.err


def test_conversations_are_asked_with_every_weight(pairs: Place) -> None:
    sizes = ("--references", 12, "--conversations", 2, "--out", "out")
    for more in ((), ("--pairs", "units.jsonl")):
        report = pairs.m3("eval", "conversations", *sizes, *more, "--json").json
        (table,) = report["tables"]
        assert table["columns"] == ["turn weight", "follow-ups", *KINDS]
        assert [row[0] for row in table["rows"]] == [0.0, 0.4, 0.8, 1.2]
        assert all(row[1]["count"] == 8 for row in table["rows"])


def test_a_conversation_is_searched_with_the_weight_of_names(pairs: Place) -> None:
    sizes = ("--references", 40, "--conversations", 20, "--out", "out", "--json")
    plain, named = (
        pairs.m3("eval", "conversations", *sizes, "--set", f"recall.names_weight={weight}").json["tables"][0]["rows"][3]
        for weight in (0, 1)
    )
    changed = 2 + KINDS.index("change")  # a message that names another subject than those before it
    assert named[changed]["value"] > plain[changed]["value"] + 0.2


@pytest.mark.slow
def test_corpora_are_those_of_their_seed(tmp_path: Path) -> None:
    one = corpora.code(1, 5, 30)
    assert one == corpora.code(1, 5, 30) != corpora.code(2, 5, 30)
    assert len(one.texts) == 30
    assert len(one.questions) == 5
    assert all(question not in one.texts[text] for question, text in one.questions)
    for content in ("{}\n", "text\n", "[]\n", '{"text": "a"}\n'):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(InputError):
            corpora.pairs(tmp_path / "a.jsonl", 0, 5, 5)
