"""The architecture page is true, and the import graph of the three packages has no circle."""

import ast
import re
import runpy
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = [ROOT / "m3runtime", ROOT / "model" / "m3model", ROOT / "backends" / "m3backends"]
MOST_FILES_AT_THE_ROOT = 6


def modules() -> dict[str, Path]:
    """The dotted name of every module of the three packages, and its file."""
    found = {}
    for package in PACKAGES:
        for file in package.rglob("*.py"):
            parts = file.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports: at its top, inside functions, and for type checkers alone.

    ``from package import module`` counts as an import of the module, not of the package around it.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in known else node.module for whole in inner.values()}
    return found & known.keys()


def rooms() -> list[str]:
    """Every folder at the top of a package, as a listing shows it."""
    inside = [file.parent for package in PACKAGES for file in package.glob("*/__init__.py")]
    return sorted(f"{folder.parent.name}/{folder.name}/" for folder in inside)


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    assert sum(map(len, graph.values())) > len(graph)  # the graph was found at all
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a circle


def test_the_root_holds_the_public_face_alone() -> None:
    files = sorted(path.name for path in (ROOT / "m3runtime").iterdir() if path.is_file())
    assert len(files) <= MOST_FILES_AT_THE_ROOT, files


def test_every_room_has_its_layer_in_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name.strip() for one in contracts for layer in one.get("layers", []) for name in layer.split("|")}
    top = {name for name in modules() if name.count(".") == 1 and not name.startswith("m3backends.")}
    assert sorted(top - layers) == []
    assert sorted(layers - top) == []


@pytest.mark.parametrize("room", rooms())
def test_the_page_names_every_room(room: str) -> None:
    assert f"`{room}`" in PAGE.read_text()


def test_every_path_that_the_page_names_exists() -> None:
    paths = re.findall(r"`((?:[\w-]+/)+(?:\w+\.\w+)?)`", PAGE.read_text())
    places = [ROOT, ROOT / "model", ROOT / "backends"]
    assert paths
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []


def test_the_pictures_are_those_that_the_script_draws() -> None:
    pictures = runpy.run_path(str(PAGE.parent / "architecture" / "draw.py"))["pictures"]()
    assert pictures
    for file, content in pictures.items():
        assert file.read_text() == content, f"python docs/architecture/draw.py makes {file.name} anew"
