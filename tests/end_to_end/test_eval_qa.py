"""``m3 eval qa``: a user's own questions of the configured bank, and public ones of the texts that they come with."""

import json
import re
from pathlib import Path

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.modes import MODES, NEEDS_ANSWER
from m3runtime.lab.evaluation.qa import QaRun, QaSettings
from m3runtime.lab.evaluation.qa_report import qa_report
from tests.core.test_question_files import HOTPOT, MARCO, NOT_ANSWERED
from tests.end_to_end.commands import Place

OWN = [
    {
        "question": "What does the harbour lamp of Uskerfold burn?",
        "answers": ["walnut oil"],
        "source": "facts/lamp.txt",
    },
    {"question": "On which day does the ferry to Brannoch not sail?", "answer": "Tuesday"},
    {"question": "Who painted the harbour lamp?", "answers": []},
]


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_bank_is_asked_and_not_changed(written_once: Place, tmp_path: Path) -> None:
    questions = tmp_path / "own.jsonl"
    questions.write_text(lines(OWN))
    before = written_once.bank.joinpath("home/data.mdb").read_bytes()
    settings = QaSettings(str(questions), timed=0)
    config = Config.load(written_once.file, {})
    run = QaRun(config, settings, tmp_path / "out")
    results = run.run(assembly.open_adapter(config))
    report = qa_report(results, run.evidence, settings, run.config).to_json()
    answers = report["results"]["answers"]
    assert set(answers) == set(MODES)
    for mode in MODES:
        assert set(answers[mode]) == ({"0"} if mode in NEEDS_ANSWER else {"0", "1", "2"})
    assert [("right" in answers["memory"][key]) for key in "012"] == [True, True, False]
    (retrieval,) = (table for table in report["tables"] if table["title"] == "Retrieval")
    nearest = dict(zip(("rank", "has", "named"), retrieval["rows"][0], strict=True))
    assert (nearest["has"]["value"], nearest["has"]["count"]) == (1.0, 2)
    assert (nearest["named"]["value"], nearest["named"]["count"]) == (1.0, 1)
    (words,) = (table for table in report["tables"] if table["title"] == "Words of the answers")
    assert {row[0]: row[1] for row in words["rows"]}["text-oracle"] == 1
    assert written_once.bank.joinpath("home/data.mdb").read_bytes() == before


def test_questions_that_do_not_fit_are_refused_in_one_line(written_once: Place, tmp_path: Path) -> None:
    questions = tmp_path / "own.jsonl"
    for rows, more, complaint in (
        (OWN[2:], (), "no question has an answer"),
        (OWN, ("--texts", 4), "the questions come without texts"),
        ([{**OWN[0], "source": "facts/lamp"}], (), "question 1: the bank .* has no source 'facts/lamp'"),
    ):
        questions.write_text(lines(rows) + "\n")
        out = tmp_path / "out"
        told = written_once.m3("eval", "qa", "--questions", questions, "--out", out, *more).complaint
        assert re.search(complaint, told)
        assert not out.exists()


@pytest.mark.slow
def test_texts_that_come_with_questions_get_a_bank_of_their_own(place: Place) -> None:
    place.text("public.jsonl", lines([HOTPOT, MARCO, NOT_ANSWERED]))
    report = place.m3("eval", "qa", "--questions", "public.jsonl", "--texts", 1, "--out", "out", "--json").json
    assert not place.bank.exists()
    assert (place.folder / "out/bank/home/data.mdb").exists()
    assert "Words of the answers" in (place.folder / "out/report.md").read_text()
    assert {key for key, of in report["results"]["questions"].items() if of["right"] is not None} == {"0", "1"}
    more = place.m3("eval", "qa", "--questions", "public.jsonl", "--texts", 9, "--out", "out", "--json")
    assert "other settings" in more.complaint or more.code == 0
    place.text("public.jsonl", lines([MARCO]))
    assert (
        "remembers other texts"
        in place.m3("eval", "qa", "--questions", "public.jsonl", "--texts", 0, "--out", "out").complaint
    )
