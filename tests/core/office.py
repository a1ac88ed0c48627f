"""Makes files of real formats with the libraries that other programs use, and broken ones among them."""

import csv
import datetime
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import docx
import openpyxl
import pptx
import pypdf
from docx.oxml import OxmlElement
from fpdf import FPDF
from pptx.util import Inches

Facts = Sequence[str]
Make = Callable[[Path], None]


def pdf(path: Path, pages: Facts, password: str = "") -> None:
    made = FPDF()
    made.set_font("helvetica", size=12)
    for text in pages:
        made.add_page()
        made.multi_cell(0, text=text)
    made.output(str(path))
    if password:
        writer = pypdf.PdfWriter(clone_from=path)
        writer.encrypt(password, algorithm="AES-256")
        writer.write(path)


def word(path: Path, sections: Sequence[tuple[str, str]]) -> None:
    made = docx.Document()
    made.add_heading("The handbook", 0)
    for title, text in sections:
        made.add_heading(title, 1)
        made.add_paragraph(text)
    made.save(str(path))


def word_with_tables(path: Path, rows: Sequence[Sequence[str]], items: Facts) -> None:
    made = docx.Document()
    made.add_heading("Tolls", 2)
    table = made.add_table(rows=0, cols=len(rows[0]))
    for row in rows:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    table.rows[0].cells[0].merge(table.rows[0].cells[1])
    for item in items:
        made.add_paragraph(item, style="List Bullet")
    made.save(str(path))


def word_with_changes(path: Path, kept: str, controlled: str, deleted: str) -> None:
    """A paragraph with a tracked insertion, one in a content control, and one that was deleted."""
    made = docx.Document()
    for text, wrapper in ((kept, "ins"), (deleted, "del")):
        run = made.add_paragraph().add_run(text)._r
        wrap(run, wrapper)
    inner = made.add_paragraph(controlled)._p
    wrap(inner, "sdtContent")
    wrap(inner.getparent(), "sdt")
    made.save(str(path))


def wrap(element: Any, name: str) -> None:
    outer = OxmlElement(f"w:{name}")
    element.addprevious(outer)
    outer.append(element)


def slides(path: Path, titled: Sequence[tuple[str, str, str]]) -> None:
    """Slides with a title, a text and notes."""
    made = pptx.Presentation()
    for title, text, notes in titled:
        slide = made.slides.add_slide(made.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
        if notes:
            slide.notes_slide.notes_text_frame.text = notes
    made.save(str(path))


def slide_with_table(path: Path, rows: Sequence[Sequence[str]], grouped: str) -> None:
    made = pptx.Presentation()
    slide = made.slides.add_slide(made.slide_layouts[6])
    table = slide.shapes.add_table(len(rows), len(rows[0]), Inches(1), Inches(1), Inches(6), Inches(2)).table
    for at, row in enumerate(rows):
        for column, text in enumerate(row):
            table.cell(at, column).text = text
    group = slide.shapes.add_group_shape()
    group.shapes.add_textbox(Inches(1), Inches(4), Inches(4), Inches(1)).text_frame.text = grouped
    made.save(str(path))


def workbook(path: Path, sheets: Sequence[tuple[str, Sequence[Sequence[object]]]]) -> None:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, rows in sheets:
        sheet = made.create_sheet(title)
        for row in rows:
            sheet.append(list(row))
    made.save(path)


def book(path: Path, chapters: Facts, *, locked: bool = False) -> None:
    items = "".join(f'<item id="c{n}" href="text/c%20{n}.xhtml" media-type="x"/>' for n in range(len(chapters)))
    spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    )
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("mimetype", "application/epub+zip")
        made.writestr("META-INF/container.xml", container)
        made.writestr("OEBPS/book.opf", package)
        for n, text in enumerate(chapters):
            made.writestr(f"OEBPS/text/c {n}.xhtml", f"<html><head><title>x</title></head><body>{text}</body></html>")
        if locked:
            data = '<e xmlns="http://www.w3.org/2001/04/xmlenc#"><CipherReference URI="OEBPS/text/c%200.xhtml"/></e>'
            made.writestr("META-INF/encryption.xml", data)


def notebook(path: Path, cells: Sequence[tuple[str, str]]) -> None:
    made = [{"cell_type": kind, "source": text.splitlines(keepends=True), "outputs": ["NEVER"]} for kind, text in cells]
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": {"language": "python"}}, "nbformat": 4}))


def table(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))


def cut(make: Make, share: float) -> Make:
    """The first part of the file that ``make`` makes."""

    def cut_off(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return cut_off


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("notes.txt", "no document")


def swollen(path: Path, member: str) -> None:
    """A zip that claims to be much larger when it is unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(member, b"0" * 1000)
        made.infolist()[0].file_size = 1 << 31


DAY = datetime.datetime(1884, 5, 1)
