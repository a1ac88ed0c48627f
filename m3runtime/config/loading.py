"""Reads the configuration from a YAML file, ``M3_...`` environment variables and single overrides."""

import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from m3runtime.config import presets
from m3runtime.config.schema import Config
from m3runtime.errors import ConfigError
from m3runtime.plugins.messages import not_known, reason

PREFIX = "M3_"
FILE_VARIABLE = "M3_CONFIG"
DEFAULT_FILE = "m3.yaml"
SET = "--set"

_MOST_TEXT = 1 << 20
"""Bytes of a configuration at most."""
_MOST_NODES = 100_000
"""Values of a configuration at most, each as often as aliases repeat it."""

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and where it came from."""

    config: Config
    origins: Mapping[str, str]
    """For each dotted key ``default``, ``memory.preset``, the file's name, an environment variable or ``--set``."""


def load_config(
    path: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read the configuration. Raises `ConfigError`: one line that names the origin, the key and what is allowed.

    ``path`` is by default what ``M3_CONFIG`` names, or else ``m3.yaml``. ``M3_RECALL__MEMORIES=3`` in ``environ`` (by
    default the process's) goes before the file, and ``overrides`` such as ``{"recall.memories": "3"}`` before both.
    Their values are YAML; ``tiers.0`` is the first tier. Relative paths are relative to the file's folder, and
    those of overrides to the working directory.
    """
    environ = os.environ if environ is None else environ
    file = Path(path or environ.get(FILE_VARIABLE) or DEFAULT_FILE)
    tree = _read_file(file)
    # A section that is there but empty says nothing about its keys.
    said = [key for key, value in _leaves(tree) if value != {} and (value is not None or len(key) > 1)]
    origins = dict.fromkeys(said, str(file))
    for key, text, origin in [*_variables(environ), *_settings(overrides or {})]:
        _override(tree, origins, key, _parse(text, origin), origin)
    given: dict[Key, str] = dict.fromkeys(presets.unsaid(tree), presets.ORIGIN)
    origins = given | origins  # the newest comes last, and that is not the preset
    try:
        config = Config.model_validate(_filled(tree))
    except ValidationError as error:
        raise ConfigError(_complaint(error, origins, file)) from None

    def origin_of(key: Key) -> str:
        origin = _origin(origins, key) or "default"
        return file.name if origin == str(file) else origin

    leaves = [key for key, _ in _leaves(config.model_dump())]
    return LoadedConfig(
        _with_paths(config, origins, file),
        MappingProxyType({".".join(key): origin_of(key) for key in leaves}),
    )


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last, and leaves dates as text.

    Also refuses aliases of aliases that would multiply a short text beyond all memory.
    """

    # A folder may be called 2024-05-01.
    yaml_implicit_resolvers = {  # noqa: RUF012 - so declared by yaml
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_document(self, node: yaml.Node) -> Any:
        if _nodes(node, {}) > _MOST_NODES:
            problem = f"more than {_MOST_NODES} values, as often as aliases repeat them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {name.value} is given twice", problem_mark=name.start_mark)
                seen.add(name.value)
        return super().construct_mapping(node, deep)


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are in a node, those of an alias anew each time. One within itself is not followed."""
    if id(node) not in known:
        known[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_nodes(part, known) for part in below)
    return known[id(node)]


def _parse(text: str, origin: str) -> Any:
    try:
        return _copied(yaml.load(text, _Loader))
    except RecursionError:
        raise ConfigError(f"{origin}: too deeply nested") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{origin}:{line} {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML forbids; `!!int x`
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from error


def _copied(node: Any) -> Any:
    """A copy in which what YAML shares by anchors stands by itself: an override changes one place."""
    if isinstance(node, dict):
        return {name: _copied(value) for name, value in node.items()}
    return [_copied(item) for item in node] if isinstance(node, list) else node


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_TEXT + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {file}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8") from error
    if len(data) > _MOST_TEXT:
        raise ConfigError(f"{file} has more than {_MOST_TEXT} bytes: it is no configuration")
    tree = _parse(text, str(file))
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file} must be a mapping of keys to values")
    return tree or {}


def _variables(environ: Mapping[str, str]) -> list[tuple[Key, str, str]]:
    names = [name for name in environ if name.startswith(PREFIX) and name != FILE_VARIABLE]
    keyed = [(tuple(name.removeprefix(PREFIX).lower().split("__")), environ[name], name) for name in names]
    return sorted(keyed, key=lambda item: _in_order(item[0]))


def _settings(overrides: Mapping[str, str]) -> list[tuple[Key, str, str]]:
    return [(tuple(name.split(".")), text, SET) for name, text in overrides.items()]


def _in_order(key: Key) -> list[tuple[int, str]]:
    """Numbers by value, so that a list grows one item after the other."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key]


def _override(tree: Any, origins: dict[Key, str], key: Key, value: Any, origin: str) -> None:
    """Set one value, or each one within a mapping, and note who did."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _override(tree, origins, (*key, str(name)), inner, origin)
        return
    node = tree
    for part, following in zip(key, (*key[1:], None), strict=True):
        place = _place(node, part, ".".join(key), origin)
        if following is None:
            node[place] = value
        elif not isinstance(_get(node, place), dict | list):
            node[place] = [] if following.isdecimal() else {}
        node = node[place]
    origins.pop(key, None)  # the newest comes last
    origins[key] = origin


def _place(node: dict[str, Any] | list[Any], part: str, key: str, origin: str) -> Any:
    """Where a part of a key leads in a mapping or a list, which it may lengthen by one."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) > len(node):
        raise ConfigError(f"{origin}: {key} is not known; the list has {len(node)} items, counted from 0")
    if int(part) == len(node):
        node.append(None)
    return int(part)


def _get(node: Any, place: Any) -> Any:
    return node.get(place) if isinstance(node, dict) else node[place]


def _leaves(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is neither a mapping nor a list of mappings, with its key."""
    if isinstance(node, dict) and node:
        inner = [(str(name), value) for name, value in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        inner = [(str(number), value) for number, value in enumerate(node)]
    else:
        yield key, node
        return
    for name, value in inner:
        yield from _leaves(value, (*key, name))


def _origin(origins: dict[Key, str], key: Key) -> str | None:
    """Who set a value, the list that it is part of, or a part of it; the newest of them."""
    for other, origin in reversed(origins.items()):
        shared = min(len(key), len(other))
        if key[:shared] == other[:shared]:
            return origin
    return None


def _sections() -> dict[str, type[BaseModel]]:
    fields = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _filled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with a mapping for every section: what is missing is then a key, and `recall:` alone is fine."""
    given = {name: value for name, value in tree.items() if value is not None}
    return {**{name: {} for name in _sections()}, **given}


def _with_paths(config: Config, origins: dict[Key, str], file: Path) -> Config:
    """Make local paths absolute, so that they mean the same wherever the configuration is used."""

    def absolute(path: str | Path, *key: str) -> Path:
        folder = file.parent if _origin(origins, key) == str(file) else Path()
        return folder.absolute() / Path(path).expanduser()

    changes: dict[str, Any] = {"bank": absolute(config.bank, "bank")}
    if config.codec.file is not None:
        file_of_codec = absolute(config.codec.file, "codec", "file")
        changes["codec"] = config.codec.model_copy(update={"file": file_of_codec})
    if config.recall.trace is not None:
        changes["recall"] = config.recall.model_copy(update={"trace": absolute(config.recall.trace, "recall", "trace")})
    if config.train is not None:
        changes["train"] = config.train.model_copy(
            update={
                "out": absolute(config.train.out, "train", "out"),
                "data": tuple(absolute(path, "train", "data") for path in config.train.data),
                "references": tuple(absolute(path, "train", "references") for path in config.train.references),
            }
        )
    for name, section in (("model", config.model), ("embedder", config.embedder)):
        if section.path in (".", "..", "~") or section.path.startswith(("./", "../", "~/")):  # else perhaps a hub name
            changes[name] = section.model_copy(update={"path": str(absolute(section.path, name, "path"))})
    return config.model_copy(update=changes)


def _complaint(error: ValidationError, origins: dict[Key, str], file: Path) -> str:
    """One line on the error that explains most: a misspelt key also leaves another one missing."""
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    key = tuple(str(part) for part in first["loc"])
    return f"{_origin(origins, key) or file}: {_explained(first, key)}"


def _explained(error: ErrorDetails, key: Key) -> str:
    dotted = ".".join(key)
    if error["type"] == "invalid_key":
        return f"{dotted} is not known; keys are text"
    if error["type"] != "extra_forbidden":
        text = reason(error)
        return f"{dotted} {text}" if text.startswith(("must", "is ")) else f"{dotted}: {text}"
    sections = _sections()
    elsewhere = [f"{name}.{key[-1]}" for name, kind in sections.items() if key[-1] in kind.model_fields]
    if elsewhere:
        return f"{dotted} is not known; did you mean {' or '.join(elsewhere)}?"
    kind = sections[key[0]] if len(key) > 1 else Config
    return not_known(".".join(key[:-1]), key[-1], kind.model_fields)
