"""Forty files of real formats: every text at its right place, every broken file named."""

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.documents.parts import Part, located
from m3runtime.documents.reading import find_files, read_documents
from m3runtime.documents.reference import Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import InputError
from tests.core import office
from tests.core.office import Make, cut


def fact(name: str) -> str:
    return f"The {name} of Harrowfen was built by seven masons who came over the mountains in the year of the flood."


NAMES = ["bridge", "mill", "ferry", "tower", "granary"]
PAGES = [fact(name) for name in NAMES]
TOLLS = [["Place", "Toll", "Keeper"], ["Bridge", "4", "Anna; née Berg"], ["Ferry", "7", "Bruno\nthe elder"]]
NOTEBOOK = [("markdown", f"# Masonry\n\n{fact('arch')}"), ("raw", "NEVER"), ("code", "# load\nstones = 7")]


def bytes_of(content: bytes) -> Make:
    return lambda path: path.write_bytes(content) and None


def text(content: str, encoding: str = "utf-8") -> Make:
    return bytes_of(content.encode(encoding))


Expected = dict[str, dict[str, str]]
"""Maps a piece of text to the metadata of its place, and to the heading in ``heading`` if it has one."""

GOOD: dict[str, tuple[Make, Expected]] = {
    "five-pages.pdf": (
        partial(office.pdf, pages=PAGES),
        {one: {"page": str(n)} for n, one in enumerate(PAGES, 1)},
    ),
    "blank-page.pdf": (partial(office.pdf, pages=["", PAGES[1]]), {PAGES[1]: {"page": "2"}}),
    "no-password-needed.pdf": (partial(office.pdf, pages=PAGES[:1], password=""), {PAGES[0]: {"page": "1"}}),
    "sections.docx": (
        partial(office.word, sections=[(name.title(), fact(name)) for name in NAMES]),
        {fact(name): {"heading": f"The handbook > {name.title()}"} for name in NAMES},
    ),
    "tables.docx": (
        partial(office.word_with_tables, rows=TOLLS, items=["The lamp burns oil.", "The bell rings twice."]),
        {
            "| Place Toll | Keeper |": {"heading": "Tolls"},
            "| Ferry | 7 | Bruno the elder |": {},
            "- The lamp burns oil.\n- The bell rings twice.": {},
        },
    ),
    "changes.docx": (
        partial(office.word_with_changes, kept="An inserted lamp.", controlled="A form for tolls.", deleted="NEVER"),
        {"An inserted lamp.": {}, "A form for tolls.": {}},
    ),
    "talk.pptx": (
        partial(office.slides, titled=[(name.title(), fact(name), f"Say why the {name} matters.") for name in NAMES]),
        {fact(name): {"slide": str(n), "heading": name.title()} for n, name in enumerate(NAMES, 1)}
        | {f"Say why the {name} matters.": {"slide": str(n)} for n, name in enumerate(NAMES, 1)},
    ),
    "table.pptx": (
        partial(office.slide_with_table, rows=TOLLS, grouped="The group says hello."),
        {"| Bridge | 4 | Anna; née Berg |": {"slide": "1"}, "The group says hello.": {"slide": "1"}},
    ),
    "sheets.xlsx": (
        partial(
            office.workbook,
            sheets=[
                ("Tolls", [["Place", "Pence", "Since"], ["Bridge", 4.0, office.DAY], [], ["Ferry", 7.5, None]]),
                ("Empty", []),
                ("Keepers", [["Name", "Years"], *([f"Keeper {n} of the long bridge", n] for n in range(40))]),
            ],
        ),
        {
            "Place: Bridge; Pence: 4; Since: 1884-05-01": {"sheet": "Tolls", "row": "2", "heading": "Tolls"},
            "Place: Ferry; Pence: 7.5": {"sheet": "Tolls", "row": "4"},
            "Name: Keeper 39 of the long bridge; Years: 39": {"sheet": "Keepers", "row": "41", "heading": "Keepers"},
        },
    ),
    "macros.xlsm": (
        partial(office.workbook, sheets=[("One", [[1, 2], [3, 4]])]),
        {"1; 2\n3; 4": {"sheet": "One", "row": "1–2"}},
    ),
    "tolls.csv": (
        partial(office.table, rows=TOLLS),
        {"Place: Bridge; Toll: 4; Keeper: Anna; née Berg": {"row": "2"}, "Bruno the elder": {"row": "3"}},
    ),
    "tolls.tsv": (partial(office.table, rows=TOLLS, delimiter="\t"), {"Place: Bridge; Toll: 4": {"row": "2"}}),
    "semicolons.csv": (
        partial(office.table, rows=TOLLS, delimiter=";", encoding="cp1252"),
        {"Place: Bridge; Toll: 4; Keeper: Anna; née Berg": {"row": "2"}},
    ),
    "one-column.csv": (partial(office.table, rows=[[one] for one in PAGES]), {PAGES[4]: {"row": "5"}}),
    "novel.epub": (
        partial(office.book, chapters=[f"<h1>{name.title()}</h1><p>{fact(name)}</p>" for name in NAMES]),
        {fact(name): {"chapter": name.title(), "heading": name.title()} for name in NAMES},
    ),
    "parts.epub": (
        partial(office.book, chapters=[f"<h2>Begin</h2><p>{PAGES[0]}</p>", f"<p>{PAGES[1]}</p>"]),
        {PAGES[0]: {"chapter": "Begin"}, PAGES[1]: {"chapter": "Begin"}},
    ),
    "masonry.ipynb": (
        partial(office.notebook, cells=NOTEBOOK),
        {fact("arch"): {"cell": "1", "heading": "Masonry"}, "````python\n# load\nstones = 7\n````": {"cell": "3"}},
    ),
    "manual.rst": (
        text(f"Mill\n====\n\n{PAGES[1]}\n\nFerry\n-----\n\n{PAGES[2]}\n"),
        {PAGES[1]: {"heading": "Mill"}, PAGES[2]: {"heading": "Mill > Ferry"}},
    ),
    "mill.py": (
        text("# not a heading\n\ndef mill() -> str:\n    return 'rye'\n"),
        {"# not a heading": {"heading": ""}},
    ),
    "tolls.sql": (text("-- tolls\nSELECT pence FROM tolls;\n"), {"````sql\n-- tolls\nSELECT pence FROM tolls;": {}}),
    "settings.yaml": (text("# the lamp\nlamp:\n  oil: walnut\n"), {"lamp:\n  oil: walnut": {"heading": ""}}),
    "gb18030.txt": (text("哈罗芬的石桥建于一八八四年。渡船每天六点离开村庄。\n", "gb18030"), {"哈罗芬的石桥": {}}),
    "shift-jis.txt": (text("石橋は千八百八十四年に建てられた。\n", "shift_jis"), {"石橋は千八百": {}}),
    "shift-jis.html": (
        text("<meta charset=Shift_JIS><h1>石橋</h1><p>千八百八十四年に建てられた。", "shift_jis"),
        {"千八百八十四年に建てられた。": {"heading": "石橋"}},
    ),
    "utf-16.txt": (text("The lamp burns walnut oil. 😀", "utf-16"), {"The lamp burns walnut oil. 😀": {}}),
    "utf-8-mark.md": (text("# Lamp\n\nIt burns walnut oil.", "utf-8-sig"), {"# Lamp\n\nIt burns": {"heading": "Lamp"}}),
    "cp1252.md": (text("The keeper’s “blue” lantern – it burns.", "cp1252"), {"The keeper’s “blue” lantern –": {}}),
    "latin-1.txt": (text("Le café de Harrowfen ouvre à sept heures.", "latin-1"), {"Le café de Harrowfen": {}}),
    "cyrillic.txt": (text("Каменный мост построен в 1884 году.", "cp1251"), {"Каменный мост построен": {}}),
}

_PDF = partial(office.pdf, pages=PAGES)
_WORD = partial(office.word, sections=[("Mill", PAGES[1])])
BROKEN: dict[str, tuple[Make, str]] = {
    "truncated.pdf": (cut(_PDF, 0.5), "is damaged or no PDF file"),
    "locked.pdf": (partial(office.pdf, pages=PAGES, password="secret"), "is encrypted; save it without"),
    "scan.pdf": (partial(office.pdf, pages=["", ""]), "holds no text but pictures of it"),
    "renamed.pdf": (text("The lamp burns oil."), "is damaged or no PDF file"),
    "archive.docx": (office.archive, "is no Word file: it has no word/document.xml"),
    "truncated.docx": (cut(_WORD, 0.7), "is damaged or no Word file"),
    "locked.xlsx": (bytes_of(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512)), "is encrypted or of an old version"),
    "swollen.pptx": (partial(office.swollen, member="ppt/presentation.xml"), "larger than 1 GiB when it is unpacked"),
    "hollow.xlsx": (partial(office.swollen, member="xl/other.xml"), "is no Excel file: it has no xl/workbook.xml"),
    "protected.epub": (partial(office.book, chapters=["<p>x</p>"], locked=True), r"is protected \(DRM\)"),
    "no.ipynb": (text('{"worksheets": []}'), "is no notebook file of version 4"),
    "half.ipynb": (text('{"cells": ['), "is damaged or no notebook file"),
    "binary.txt": (bytes_of(b"The lamp\0 burns."), "is a binary file"),
    "damaged.txt": (bytes_of("Zwölf Boxkämpfer jagen Viktor über".encode() + b"\xe4 x"), "byte 37 is not UTF-8"),
    "noise.md": (bytes_of(bytes(range(128, 256)) * 40), "is a binary file, or text in an unknown encoding"),
}  # fmt: skip

PARSED = (".pdf", ".docx", ".pptx", ".xlsx", ".csv", ".epub", ".ipynb")


def test_there_are_forty() -> None:
    assert len(GOOD) + len(BROKEN) >= 40


def references(*paths: Path, whole: bool = False) -> list[Reference]:
    splitter = Splitter(lambda text: len(text.split()), max_tokens=40)
    with closing(ReferenceSpool(read_documents(paths), splitter, whole=whole)) as spool:
        return list(spool)


@pytest.mark.parametrize("name", GOOD)
def test_every_text_is_at_its_place(tmp_path: Path, name: str) -> None:
    make, expected = GOOD[name]
    make(path := tmp_path / name)
    found = references(tmp_path)
    (document,) = read_documents([tmp_path])
    assert "NEVER" not in document.text
    for piece, metadata in expected.items():
        one = next(one for one in found if piece in one.text or piece in " ".join(one.text.split()))
        assert one.source == path.as_posix()
        assert document.text[one.start : one.end] == one.text
        wanted = dict(metadata)
        if (heading := wanted.pop("heading", None)) is not None:
            assert one.heading == heading
        for key, value in wanted.items():
            assert covers(one.places[0].metadata[key], value)


def covers(stretch: str, one: str) -> bool:
    """Is this page, row or other number in a stretch such as ``3–5``?"""
    first, _, last = stretch.partition("–")
    return stretch == one or (bool(last) and int(first) <= int(one) <= int(last))


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_file_is_named(tmp_path: Path, name: str) -> None:
    make, message = BROKEN[name]
    make(tmp_path / name)
    assert [path.name for path in find_files([tmp_path])[0]] == [name]
    with pytest.raises(InputError, match=message) as caught:
        references(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in GOOD if name.endswith(PARSED)])
def test_a_damaged_file_gives_text_or_one_line(tmp_path: Path, name: str) -> None:
    GOOD[name][0](path := tmp_path / name)
    content, random = path.read_bytes(), Random(name)
    complaints = []
    for _ in range(4):
        damaged = bytearray(content[: random.randrange(len(content))] if random.random() < 0.3 else content)
        for place in random.sample(range(len(damaged)), min(len(damaged), random.choice([1, 20]))):
            damaged[place] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            references(path)
        except InputError as error:
            complaints.append(str(error))
    assert all(name in one and "\n" not in one for one in complaints)


def test_a_page_is_cited_where_a_sentence_crosses_it(tmp_path: Path) -> None:
    office.pdf(tmp_path / "a.pdf", ["The lamp burns walnut oil and", "it never sleeps."])
    (one,) = references(tmp_path / "a.pdf")
    assert one.places[0].metadata == {"page": "1–2"}


def test_a_whole_document_has_all_its_places(tmp_path: Path) -> None:
    office.table(tmp_path / "a.csv", [["name", "toll"], ["bridge", "4"], ["ferry", "7"]])
    (one,) = references(tmp_path / "a.csv", whole=True)
    assert one.text == "name: bridge; toll: 4\nname: ferry; toll: 7"
    assert one.places[0].metadata == {"row": "2–3"}


def test_rows_are_streamed(tmp_path: Path) -> None:
    office.table(tmp_path / "a.csv", [["name", "toll"], *([f"house {n}", str(n)] for n in range(20_000))])
    (document,) = read_documents([tmp_path / "a.csv"])
    rows = document.parts()
    assert next(rows).metadata == {"row": "2"}
    assert len({row.metadata["row"] for row in rows}) == 20_000


@given(st.lists(st.text("ab \n", max_size=6), min_size=1), st.integers(1, 4))
def test_a_reference_has_the_places_of_its_first_and_last_part(texts: list[str], tokens: int) -> None:
    parts = [Part(text, {"page": str(n)}) for n, text in enumerate(texts)]
    whole = "".join(texts)
    pages = [str(n) for n, text in enumerate(texts) for _ in text]
    splitter = Splitter(lambda text: len(text.split()), max_tokens=tokens)
    found = list(located(parts, lambda blocks: splitter.stream(blocks, "a")))
    assert [(one.text, one.start, one.end) for one in found] == [
        (one.text, one.start, one.end) for one in splitter.split(whole)
    ]
    for one in found:
        first, last = pages[one.start], pages[one.end - 1]
        assert one.places[0].metadata["page"] == (first if first == last else f"{first}–{last}")


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    office.pdf(tmp_path / "a.pdf", PAGES)
    with pytest.raises(InputError, match=r"a\.pdf needs pypdf: pip install 'm3runtime\[documents\]'"):
        list(read_documents([tmp_path / "a.pdf"]))
