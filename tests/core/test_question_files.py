"""Files of questions in the formats that public sets come in, each with two questions or three."""

import json
from pathlib import Path
from typing import Any

import pytest

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.judging import f1, is_exact
from m3runtime.lab.evaluation.question_files import Asked, Text, read_questions

BRIDGE = Text("Old town", "The stone bridge was built in 1431.")
LAMP = Text("Lamp", "The lamp burns walnut oil.")
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Old_town",
            "paragraphs": [
                {
                    "context": BRIDGE.text,
                    "qas": [
                        {"id": "a", "question": "When?", "answers": [{"text": "1431", "answer_start": 30}] * 2},
                        {"id": "b", "question": "By whom?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
SQUAD_ROW = {
    "id": "a",
    "title": "Old_town",
    "context": BRIDGE.text,
    "question": "When?",
    "answers": {"text": ["1431", "1431"], "answer_start": [30, 30]},
}
HOTPOT = {
    "_id": "x",
    "question": "When?",
    "answer": "1431",
    "type": "bridge",
    "level": "easy",
    "supporting_facts": [["Old town", 0]],
    "context": [["Old town", ["The stone bridge ", "was built in 1431."]], ["Lamp", ["The lamp burns walnut oil."]]],
}
HOTPOT_ROW = {
    **HOTPOT,
    "supporting_facts": {"title": ["Old town"], "sent_id": [0]},
    "context": {"title": ["Old town", "Lamp"], "sentences": [[BRIDGE.text], [LAMP.text]]},
}
PASSAGES = [{"is_selected": 1, "passage_text": BRIDGE.text, "url": "u"}, {"is_selected": 0, "passage_text": LAMP.text}]
MARCO = {"query": "When?", "answers": ["1431"], "passages": PASSAGES, "query_id": 7, "query_type": "NUMERIC"}
MARCO_ROW = {
    **MARCO,
    "passages": {"is_selected": [1, 0], "passage_text": [BRIDGE.text, LAMP.text], "url": ["u", "v"]},
}
NOT_ANSWERED = {**MARCO, "query": "By whom?", "answers": ["No Answer Present."]}


def read(folder: Path, content: str) -> list[Asked]:
    path = folder / "questions.json"
    path.write_text(content)
    return read_questions(path)


def bare(asked: Asked) -> tuple[Any, ...]:
    return asked.question, asked.answers, asked.right, asked.others, asked.sources


@pytest.mark.parametrize("row", [SQUAD_ROW, HOTPOT, HOTPOT_ROW, MARCO, MARCO_ROW])
def test_a_row_is_the_same_question_in_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    marco = "passages" in row
    titles = ("", "") if marco else ("Old town", "Lamp")
    others = () if row is SQUAD_ROW else (Text(titles[1], LAMP.text),)
    wanted = ("When?", ("1431",), (Text(titles[0], BRIDGE.text),), others, ())
    line = json.dumps(row)
    for content in (line, f"{line}\n\n", f"[{line}]"):
        assert [bare(one) for one in read(tmp_path, content)] == [wanted]
    assert [bare(one) for one in read(tmp_path, f"{line}\n{line}\n")] == [wanted] * 2


def test_files_as_they_are_published(tmp_path: Path) -> None:
    one, two = read(tmp_path, json.dumps(SQUAD))
    assert bare(one) == ("When?", ("1431",), (BRIDGE,), (), ())
    assert bare(two) == ("By whom?", (), (BRIDGE,), (), ())
    both = {"3": MARCO, "9": NOT_ANSWERED}
    columns = {name: {key: row[name] for key, row in both.items()} for name in MARCO}
    one, two = read(tmp_path, json.dumps(columns))
    assert bare(one)[:2] == ("When?", ("1431",))
    assert bare(two)[:2] == ("By whom?", ())
    assert "question 9" in two.where


def test_a_line_of_ones_own(tmp_path: Path) -> None:
    lines = [
        {"question": "Where?", "answer": ["Oslo", "in Oslo"]},  # as in NQ-open
        {"question": "When?", "answers": "1431", "source": "bridge.md"},
        {"question": "Why?", "answers": [], "source": ["a.md", "b.md"]},
        {"question": "Why?", "answer": None},
    ]
    read_here = read(tmp_path, "\ufeff" + "".join(json.dumps(line) + "\n" for line in lines))
    assert [bare(one)[1] for one in read_here] == [("Oslo", "in Oslo"), ("1431",), (), ()]
    assert [one.sources for one in read_here] == [(), ("bridge.md",), ("a.md", "b.md"), ()]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "there is no question"),
        ("[]", "there is no question"),
        ("{}", "question 1: not a question"),
        ('{"question": "Why?"}', "question 1: not a question"),
        ('{"question": "Why?", "answer": 1}\n', "question 1: not a question"),
        ('{"question": " ", "answer": "b"}\n{"question": "a", "answer": "b"}', "line 1: not a question"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"', "line 2 is not JSON"),
        ('{"question": "a", "answer": "b"}\n[1]\n', "line 2: not a question"),
        ('{"question": "a", "answer": "b"}\n"text"\n', "line 2: not a question"),
        ('{"question": "\\ud800", "answer": "b"}', "question 1: not a question"),
        ('{"question": "a", "answer": "\\ud800"}', "question 1: not a question"),
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "article 1: not as in SQuAD"),
        ('{"data": [1]}', "article 1: not as in SQuAD"),
        (json.dumps({**HOTPOT, "context": [["a"]]}), "question 1: not a question"),
        (json.dumps({**MARCO, "passages": {"is_selected": [1], "passage_text": []}}), "question 1: not a question"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "a", tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_questions(path)


@pytest.mark.parametrize(
    ("text", "accepted", "exact", "overlap"),
    [
        ("The Stone bridge.", ["stone bridge"], True, 1.0),
        ("a stone bridge", ["1431", "Stone bridge"], True, 1.0),
        ("the old stone bridge", ["stone bridge"], False, 0.8),
        ("stone stone", ["stone bridge"], False, 0.5),
        ("oil", ["stone bridge"], False, 0.0),
        ("", ["stone bridge"], False, 0.0),
        ("the", ["an"], True, 1.0),
    ],
)
def test_answers_are_compared_as_squad_compares_them(
    text: str, accepted: list[str], exact: bool, overlap: float
) -> None:
    assert is_exact(text, accepted) is exact
    assert f1(text, accepted) == pytest.approx(overlap)
