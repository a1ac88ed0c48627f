"""PowerPoint presentations: the texts of each slide, its title as a heading, and its notes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import check_zip, library, readable


def read(path: Path) -> Iterator[Part]:
    """The slides in order."""
    pptx = library(path, "pptx")
    check_zip(path, "PowerPoint", "ppt/presentation.xml")
    with readable(path, "PowerPoint"):
        for number, slide in enumerate(pptx.Presentation(str(path)).slides, 1):
            yield Part(_slide(slide), {"slide": str(number)})


def _slide(slide: Any) -> str:
    title = slide.shapes.title
    heading = " ".join(title.text_frame.text.split()) if title is not None else ""
    texts = [f"# {heading}" if heading else ""]
    texts += _texts(shape for shape in slide.shapes if title is None or shape.shape_id != title.shape_id)
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        texts.append(slide.notes_slide.notes_text_frame.text.strip())
    return "".join(f"{text}\n\n" for text in texts if text)


def _texts(shapes: Iterable[Any]) -> Iterator[str]:
    for shape in shapes:
        if shape.has_text_frame:
            yield "\n".join(line.text.strip() for line in shape.text_frame.paragraphs if line.text.strip())
        elif shape.has_table:
            rows = ([" ".join(cell.text.split()) for cell in row.cells] for row in shape.table.rows)
            yield "\n".join(f"| {' | '.join(row)} |" for row in rows if any(row))
        elif hasattr(shape, "shapes"):  # a group
            yield from _texts(shape.shapes)
