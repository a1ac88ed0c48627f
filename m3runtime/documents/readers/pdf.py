"""PDF: the text of each page."""

import logging
from collections.abc import Iterator
from pathlib import Path

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import library, readable
from m3runtime.errors import InputError

_ENDS = (".", "!", "?", ":", "。")


def read(path: Path) -> Iterator[Part]:
    """The pages, one in memory at a time. Raises `InputError` also for a PDF that has pictures alone."""
    pypdf = library(path, "pypdf")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it complains of much that it then reads well
    blank = True
    with readable(path, "PDF"), path.open("rb") as file:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{path} is encrypted; save it without its password")
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text().strip()
            if text:
                blank = False
                # A sentence may go on on the next page.
                yield Part(text + ("\n\n" if text.endswith(_ENDS) else "\n"), {"page": str(number)})
    if blank:
        raise InputError(f"{path} holds no text but pictures of it; recognise it first (OCR)")
