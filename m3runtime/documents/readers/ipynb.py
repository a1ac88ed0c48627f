"""Jupyter notebooks: Markdown and code of each cell, without outputs."""

import json
from collections.abc import Iterator
from pathlib import Path

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.code import FENCE
from m3runtime.documents.readers.opening import readable
from m3runtime.documents.text import file_blocks, text_blocks
from m3runtime.errors import InputError


def read(path: Path) -> Iterator[Part]:
    """The cells in order; the notebook is in memory as a whole."""
    text = "".join(text_blocks(file_blocks(path), str(path)))
    with readable(path, "notebook"):
        notebook = json.loads(text)
        cells = notebook.get("cells") if isinstance(notebook, dict) else None
        if not isinstance(cells, list):
            raise InputError(f"{path} is no notebook file of version 4: it has no cells")
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        for number, cell in enumerate(cells, 1):
            source = cell["source"]
            content = (source if isinstance(source, str) else "".join(source)).strip("\n")
            if content.strip() and cell["cell_type"] in ("markdown", "code"):
                shown = content if cell["cell_type"] == "markdown" else f"{FENCE}{language}\n{content}\n{FENCE}"
                yield Part(f"{shown}\n\n", {"cell": str(number)})
