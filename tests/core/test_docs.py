"""The documents are true of the code."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import BaseModel

import m3runtime.cli
from m3runtime import errors
from m3runtime.config.schema import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
OF_A_USER = {"your", "folder_tier", "toy_stack"}
"""Modules that the reader of a page writes."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel) and not name.startswith("tiers")]
        found += keys(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def attributes(tree: ast.AST, names: set[str]) -> Iterator[tuple[str, str]]:
    """Each ``Name.attribute`` in the code, for these names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield node.value.id, node.attr


def test_every_key_of_the_configuration_is_described_and_no_other() -> None:
    lines = (DOCS / "configuration.md").read_text().splitlines()
    described = [line.split("`")[1] for line in lines if line.startswith("| `") and "." in line.split("`")[1]]
    described += [line.split("`")[1] for line in lines if line.startswith(("| `bank`", "| `tiers` | `[]`"))]
    assert sorted(described) == sorted(keys(Config))


@each_page
def test_names_in_python_examples_exist(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] not in OF_A_USER:
                module = importlib.import_module(node.module)
                found.update({alias.asname or alias.name: getattr(module, alias.name) for alias in node.names})
        for name, attribute in attributes(tree, set(found)):
            assert hasattr(found[name], attribute), f"{name}.{attribute}"


@each_page
def test_commands_in_examples_exist(page: Path) -> None:
    commands = typer.main.get_command(m3runtime.cli.app).commands
    for line in "".join(blocks(page, "sh")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["m3"]:
            command = commands[words[1]]
            assert not hasattr(command, "commands") or words[2] in command.commands, line


@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=lambda page: page.name)
def test_the_first_configuration_is_valid(page: Path, tmp_path: Path) -> None:
    [text] = blocks(page, "yaml")
    file = tmp_path / "m3.yaml"
    file.write_text(text)
    assert Config.load(file, environ={}).bank == tmp_path / "bank"


def test_the_error_tree_is_drawn_as_it_is() -> None:
    def tree(kind: type[Exception], depth: int = 0) -> Iterator[tuple[int, str]]:
        yield depth, kind.__name__
        for inner in kind.__subclasses__():
            if inner.__module__ == errors.__name__:
                yield from tree(inner, depth + 1)

    drawn = [
        (len(match[1]) // 4, match[2])
        for match in re.finditer(r"^    ((?:[│├└─ ]{4})*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    ]
    assert drawn == list(tree(errors.M3Error))
