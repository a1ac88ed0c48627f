"""Small files, each made after a public report of somebody's trouble with texts of that kind."""

import unicodedata
from pathlib import Path

import pytest

from m3runtime.documents.reading import find_files, read_file
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError

CASES = Path(__file__).parent / "cases"
TOLL = "The toll is four pence."
ARCHES = "Seven arches stand."
BRIDGE = "# Bridge\n\nThe stone bridge has seven arches."
MILL = "The mill of Harrowfen grinds rye."
TEXTS = {
    "html/alt.html": "# The toll of the stone bridge\n\nThe toll is four pence\n\nThe note is here\n\nseven arches",
    "html/comment.html": TOLL,
    "html/fragment.html": f"{TOLL}\n\n{ARCHES}",
    "html/nested-table.html": "Arch\n\n| first | 12 ft |\n\n| Second & third | 14½ ft 🌉 ¬anentity; <b> |",
    "html/no-head-end.html": f"{BRIDGE}\n\n{TOLL}",
    "html/no-head-tags.html": BRIDGE,
    "html/noscript.html": TOLL,
    "html/self-title.html": TOLL,
    "html/style-in-body.html": f"{TOLL}\n\n{ARCHES}",
    "html/template.html": TOLL,
    "html/unclosed-script.html": TOLL,
    "jsonl/ansi.jsonl": "The toll is four pence. \x1b[2K\x1b[1A\x1b]0;owned\x07 The bridge has seven arches.",
    "jsonl/bigint.jsonl": MILL,
    "jsonl/blank-text.jsonl": MILL,
    "jsonl/bom.jsonl": MILL,
    "jsonl/duplicate-keys.jsonl": MILL,
    "jsonl/nan.jsonl": MILL,
    "jsonl/nul-escape.jsonl": "The mill\0 of Harrowfen grinds rye.",
    "jsonl/utf16.jsonl": MILL,
    "oneword/VERSION.txt": "1.4.2",
}
UNREAD = {
    "jsonl/array.jsonl": ["line 1 is not JSON", "line 2 is not JSON", "line 4 is not JSON"],
    "jsonl/nested.jsonl": ["line 1 is not an object with a text in 'text'"],
    "jsonl/null.jsonl": ["line 2 is not an object with a text in 'text'"],
    "jsonl/number.jsonl": ["line 1 is not an object with a text in 'text'"],
    "jsonl/other-field.jsonl": ["line 1 is not an object with a text in 'text'"],
    "jsonl/pretty.jsonl": ["line 1 is not JSON", "line 2 is not JSON", "line 3 is not JSON"],
    "jsonl/surrogate.jsonl": ["line 1: 'text' has half a character"],
    "jsonl/trailing-comma.jsonl": ["line 1 is not JSON"],
}


def text(name: str) -> str:
    return "\n\n".join(document.text.strip() for document in read_file(CASES / name, name))


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    assert text(name) == TEXTS[name]


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_named(name: str) -> None:
    unread: list[InputError] = []
    for document in read_file(CASES / name, name, unread=unread.append):
        assert document.text
    assert len(unread) == len(UNREAD[name])
    for error, reason in zip(unread, UNREAD[name], strict=True):
        assert f"{name}, {reason}" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("path", sorted([*CASES.glob("script/*"), *CASES.glob("md/*")]), ids=lambda path: path.name)
def test_every_text_is_split(path: Path) -> None:
    whole = text(str(path.relative_to(CASES)))
    passages = Splitter(lambda text: len(text.encode()) // 3 + 1).split(whole)
    assert passages
    assert "".join("".join(passage.text for passage in passages).split()) == "".join(whole.split())


def test_no_vowel_is_cut_from_its_letter() -> None:
    passages = Splitter(len).split(text("script/thai.txt"))
    assert len(passages) > 5
    assert all(unicodedata.category(passage.text[0]) != "Mn" for passage in passages)


def test_a_picture_is_left_out() -> None:
    assert text("md/base64-small.md").startswith("# Picture\n\nThe bridge in winter.\n\n![bridge]()\n\n")
    assert len(Splitter(len).split(text("md/base64-small.md"))) == 1


def test_a_text_of_one_word_refuses_no_folder() -> None:
    names = [path.name for path in find_files([CASES / "oneword", CASES / "oneword.jsonl"])[0]]
    assert names == ["VERSION.txt", "good0.md", "good1.md", "good2.md", "oneword.jsonl"]
    assert len(list(read_file(CASES / "oneword.jsonl", "oneword.jsonl"))) == 3
