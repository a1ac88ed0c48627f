"""The demo: a small corpus, and the settings of a bank over it with models out of installed packages."""

from pathlib import Path
from pydoc_data.topics import topics

from m3runtime.errors import InputError
from m3runtime.plugins import installed

SETTINGS = Path(__file__).with_name("m3.yaml")
"""The configuration, without the paths that `overrides` gives."""
HANDBOOK = Path(__file__).with_name("handbook.md")
"""The handbook of an invented town: no model knows it from its training."""
FOLDER = Path(".demo")
"""The folder of the demo's bank, corpus and uploads, in the working directory."""
CHAPTERS = (
    *("assert", "bltin-null-object", "booleans", "class", "comparisons", "continue", "del", "exceptions", "for"),
    *("function", "global", "if", "lambda", "naming", "pass", "raise", "return", "try", "typesfunctions", "with"),
)
"""Chapters of the Python language reference, out of the standard library: real text around the handbook."""


def overrides(folder: Path) -> dict[str, str]:
    """The values of the configuration for a demo in a folder, by key.

    Raises `InputError` if the package of the model or of the embedder is not installed.
    """
    model, embedder = installed.find(installed.MODEL), installed.find(installed.EMBEDDER)
    if model is None or embedder is None:
        missing = [one for one, path in ((installed.MODEL, model), (installed.EMBEDDER, embedder)) if path is None]
        raise InputError(f"the demo's models are missing: {installed.install_line(*missing)}")
    return {"bank": str(folder / "bank"), "model.path": str(model), "embedder.path": str(embedder)}


def corpus(folder: Path) -> Path:
    """Write the corpus into a folder of the demo's, and return it. Files that are as they should be stay."""
    found = folder / "corpus"
    texts = {"handbook.md": HANDBOOK.read_text(), **{f"python/{name}.txt": topics[name] for name in CHAPTERS}}
    for name, text in texts.items():
        file = found / name
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return found
