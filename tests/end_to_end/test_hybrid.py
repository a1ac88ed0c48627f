"""A bank that is searched by words: its index follows the home, and keeps nothing of what was erased."""

from pathlib import Path

import pytest

from m3runtime.bank.index import LEXICAL
from tests.end_to_end.commands import Place

CODES = [f"Unit QX{number} was mended in the year {1900 + number}." for number in range(20)]
CHINESE = "图书馆星期一休息。"


@pytest.fixture
def docs(place: Place) -> Place:
    """A bank that was written before words were searched."""
    place.configure(memory={"reference_tokens": 40})
    for number, text in enumerate(CODES):
        place.text(f"docs/{number}.txt", text)
    place.text("docs/zh.txt", CHINESE)
    assert place.m3("write", "docs", "--whole").code == 0
    return place


def best(place: Place, text: str, *options: str) -> str:
    found = place.m3("search", text, "-k", 1, *options, "--json").json
    return found[0]["text"] if found else ""


@pytest.mark.parametrize("search", ["lexical", "hybrid"])
def test_a_bank_is_searched_by_words_from_now_on(docs: Place, search: str) -> None:
    docs.configure(recall={"search": search})
    assert not (docs.bank / LEXICAL).exists()
    assert best(docs, "qx7") == CODES[7]  # of an index that is not stored
    assert docs.m3("write", "docs", "--whole").code == 0
    docs.text("docs/new.txt", "Unit ZZ99 is new.")
    assert docs.m3("write", "docs", "--whole").code == 0
    before = (docs.bank / LEXICAL).read_bytes()
    assert best(docs, "what about ZZ99?") == "Unit ZZ99 is new."
    assert best(docs, "图书馆") == CHINESE
    assert best(docs, "QX7", "--where", "source=docs/8.txt") in (CODES[8], "")
    assert (docs.bank / LEXICAL).read_bytes() == before
    assert "lexical" not in docs.m3("verify").out
    (docs.bank / LEXICAL).write_bytes(before[:-1])
    assert best(docs, "qx7") == CODES[7]


def words_in(path: Path) -> bytes:
    return path.read_bytes().lower() if path.exists() else b""


def test_what_is_erased_is_gone_from_the_index_of_words(docs: Place) -> None:
    docs.configure(recall={"search": "hybrid"})
    docs.text("docs/more.txt", "Unit SECRET42 is here.")
    assert docs.m3("write", "docs", "--whole").code == 0
    assert b"secret42" in words_in(docs.bank / LEXICAL)
    assert docs.m3("forget", "docs/more.txt", "--erase").code == 0
    assert b"secret42" not in words_in(docs.bank / LEXICAL)
    assert "SECRET42" not in best(docs, "secret42")
    docs.text("docs/most.txt", "Unit SECRET43 is here.")
    assert docs.m3("write", "docs", "--whole").code == 0
    assert b"secret43" in words_in(docs.bank / LEXICAL)
    docs.configure(recall={"search": "dense"})
    assert docs.m3("forget", "docs/most.txt", "--erase").code == 0
    assert b"secret43" not in words_in(docs.bank / LEXICAL)
