"""Reads YAML 1.2 as plain values, and refuses in one line a text that is wrong or made to do harm."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node
from ruamel.yaml.reader import ReaderError

from m3runtime.errors import ConfigError

MOST_BYTES = 1 << 20
"""Bytes of a configuration file at most."""
_MOST_VALUES = 100_000
"""Values of a text at most, those of an alias counted at each of its uses."""


def read_yaml_file(file: Path) -> dict[str, Any]:
    """The mapping in a file, empty for an empty file.

    Raises `ConfigError` with the file's name, and the line where there is one, if the file cannot be read, is not
    UTF-8, has more than `MOST_BYTES`, or holds something else than one mapping; and as `parse_yaml` does.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        hint = "; `m3 init` makes one" if str(file) == "m3.yaml" else ""
        raise ConfigError(f"no such configuration file: {file}{hint}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{file} has more than {MOST_BYTES} bytes: it is no configuration")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file} is not text in UTF-8 (line {line})") from error
    tree = parse_yaml(text, str(file), written=True)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file} must be a mapping of keys to values")
    return tree or {}


def parse_yaml(text: str, origin: str, *, written: bool = False) -> Any:
    """The value of one YAML document, made of plain Python values that no two places share.

    Dates stay text. With ``written``, numbers know their text (`WrittenInt`). Raises `ConfigError`, which begins with
    ``origin``, for a text that is not YAML, gives a key twice, has a tag other than YAML's own, is too deeply nested,
    or whose aliases multiply it beyond measure.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.composer.warn_double_anchors = False  # YAML allows an anchor to be given again
    try:
        found = _unshared(yaml.load(text))
        return found if written else plain(found)
    except RecursionError:
        raise ConfigError(f"{origin}: too deeply nested") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{origin}: line {line}: the character {text[error.position]!r} is not allowed") from error
    except MarkedYAMLError as error:
        at = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{origin}: {at}{shorten(error.problem or error.context, 200)}") from error
    except (YAMLError, ValueError) as error:  # such as `!!int x`
        raise ConfigError(f"{origin}: {shorten(str(error), 200)}") from error


class WrittenInt(int):
    """A whole number that knows how it was written: a key that takes text gets that text."""

    text: str

    def __str__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A number that knows how it was written: a key that takes text gets that text."""

    text: str

    def __str__(self) -> str:
        return self.text


def plain(value: Any) -> Any:
    """A value without the texts of its numbers."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return int(value) if isinstance(value, WrittenInt) else float(value) if isinstance(value, WrittenFloat) else value


class _Constructor(SafeConstructor):
    """Leaves dates as text, since a folder may be called 2024-05-01, and counts values before any is made."""

    def construct_written_int(self, node: Node) -> WrittenInt:
        number = WrittenInt(self.construct_yaml_int(node))
        number.text = node.value
        return number

    def construct_written_float(self, node: Node) -> WrittenFloat:
        number = WrittenFloat(self.construct_yaml_float(node))
        number.text = node.value
        return number

    def construct_document(self, node: Node) -> Any:
        _count_values(node, {})
        return super().construct_document(node)


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_written_int)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_written_float)


def _count_values(node: Node, known: dict[int, int]) -> int:
    """The number of values in a node, those of an alias anew at each use; a node within itself is not followed.

    Raises `MarkedYAMLError` at the first node that has too many.
    """
    if id(node) not in known:
        known[id(node)] = 0
        inner = node.value if isinstance(node, CollectionNode) else []
        below = [part for pair in inner for part in pair] if isinstance(node, MappingNode) else inner
        known[id(node)] = 1 + sum(_count_values(part, known) for part in below)
        if known[id(node)] > _MOST_VALUES:
            problem = f"more than {_MOST_VALUES} values, those of aliases counted at each use"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return known[id(node)]


def _unshared(node: Any) -> Any:
    """A copy in which the uses of an anchor stand alone, so that an override changes one place."""
    if isinstance(node, dict):
        return {name: _unshared(value) for name, value in node.items()}
    return [_unshared(item) for item in node] if isinstance(node, list) else node
