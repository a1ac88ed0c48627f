"""The example of docs/write-a-tier.md, as it is written."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

DOCUMENT = Path(__file__).parents[2] / "docs" / "write-a-tier.md"


def files() -> dict[str, str]:
    """The document's files by the name that each begins with."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return {name: block for block, name in re.findall(r"^```(?:python|yaml)\n(# (\S+)\n.*?)^```$", text, re.S | re.M)}


def write(folder: Path) -> None:
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")


def load(folder: Path, name: str) -> ModuleType:
    """Import one of the files by its own name, as a user's tests would."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
