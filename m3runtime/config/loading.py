"""Fills the model of a configuration from a YAML file, ``M3_...`` environment variables and single overrides."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from m3runtime.config import presets
from m3runtime.config.section import MAY_BE_LOCAL, Section
from m3runtime.config.tree import Key, Tree, leaves
from m3runtime.config.yaml_file import parse_yaml, read_yaml_file
from m3runtime.errors import ConfigError
from m3runtime.plugins.messages import not_known, reason

PREFIX = "M3_"
FILE_VARIABLE = "M3_CONFIG"
DEFAULT_FILE = "m3.yaml"
SET = "--set"

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class LoadedConfig(Generic[S]):
    """A configuration and the origins of its values."""

    config: S
    file: Path
    """The configuration file."""
    origins: Mapping[str, str]
    """For each dotted key ``default``, ``memory.preset``, the file's name, an environment variable or ``--set``."""


def load_config(
    kind: type[S],
    path: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LoadedConfig[S]:
    """Read the configuration that the model ``kind`` describes. It is validated once, when all values are known.

    ``path`` is by default the file that ``M3_CONFIG`` names, or else ``m3.yaml``. A variable in ``environ`` (default:
    the process's) such as ``M3_RECALL__MEMORIES=3`` takes precedence over the file, and ``overrides`` such as
    ``{"recall.memories": "3"}`` over both. Their values are YAML; ``tiers.0`` is the first tier. Relative paths in the
    file are relative to its folder, those in overrides to the working directory.

    Raises `ConfigError`: one line that names the origin, the key and the values that are allowed.
    """
    environ = os.environ if environ is None else environ
    file = Path(path or environ.get(FILE_VARIABLE) or DEFAULT_FILE)
    tree = Tree(read_yaml_file(file), str(file))
    for key, text, origin in [*_variables(environ, kind), *_settings(overrides or {})]:
        # `sink=Reference:` is a text, and in YAML a mapping.
        is_text = _annotation(kind, key) is str and text.rstrip().endswith(":")
        value = text if is_text else parse_yaml(text, origin, written=True)
        tree.override(key, value, origin)
    given = {name: value for name, value in tree.values.items() if value is not None}
    try:
        # With a mapping for every section, a message about a missing value has its whole key.
        config = kind.model_validate({**{name: {} for name in _sections(kind)}, **given})
    except ValidationError as error:
        raise ConfigError(_complaint(error, kind, tree, file)) from None

    def folder_of(key: Key) -> Path:
        return file.parent if tree.origin(key) == str(file) else Path()

    def origin_of(key: Key) -> str:
        origin = tree.origin(key) or (presets.ORIGIN if key in by_preset else "default")
        return file.name if origin == str(file) else origin

    values = config.model_dump()
    by_preset = presets.keys(values)
    origins = {".".join(key): origin_of(key) for key, _ in leaves(values)}
    return LoadedConfig(_with_absolute_paths(config, folder_of), file, MappingProxyType(origins))


def _variables(environ: Mapping[str, str], kind: type[Section]) -> list[tuple[Key, str, str]]:
    names = [name for name in environ if name.startswith(PREFIX) and name != FILE_VARIABLE]
    keyed = [(tuple(name.removeprefix(PREFIX).lower().split("__")), environ[name], name) for name in names]
    known = list(kind.model_fields)
    # Other programs have variables such as M3_HOME. One that is nearly a key is a mistake, which is complained of.
    keyed = [one for one in keyed if len(one[0]) > 1 or get_close_matches(one[0][0], known, 1, cutoff=0.75)]
    return sorted(keyed, key=lambda item: _in_order(item[0]))


def _settings(overrides: Mapping[str, str]) -> list[tuple[Key, str, str]]:
    return [(tuple(name.split(".")), text, SET) for name, text in overrides.items()]


def _in_order(key: Key) -> list[tuple[int, str]]:
    """Numbers by value, so that a list grows one item after the other."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key]


def _sections(kind: type[Section]) -> dict[str, type[Section]]:
    """The sections that a configuration always has, by name."""
    fields = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: inner for name, inner in fields.items() if isinstance(inner, type) and issubclass(inner, Section)}


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, perhaps an optional one."""
    kinds = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
    return next((one for one in kinds if issubclass(one, Section)), None)


def _annotation(kind: type[Section], key: Key) -> Any:
    """The type of the value at a key; None for a key that is not known, or an option."""
    for part in key[:-1]:
        field = kind.model_fields.get(part)
        section = None if field is None else _section(field.annotation)
        if section is None:
            return None
        kind = section
    field = kind.model_fields.get(key[-1])
    return None if field is None else field.annotation


def _with_absolute_paths(section: S, folder_of: Callable[[Key], Path], key: Key = ()) -> S:
    """The section with absolute paths, which mean the same wherever the configuration is used."""
    changes: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, place = getattr(section, name), (*key, name)
        if isinstance(value, Section):
            changes[name] = _with_absolute_paths(value, folder_of, place)
        elif isinstance(value, Path):
            changes[name] = _absolute(value, folder_of(place))
        elif isinstance(value, tuple) and value and isinstance(value[0], Path):
            changes[name] = tuple(_absolute(path, folder_of(place)) for path in value)
        elif MAY_BE_LOCAL in field.metadata and (value in (".", "..", "~") or value.startswith(("./", "../", "~/"))):
            changes[name] = str(_absolute(Path(value), folder_of(place)))
    return section.model_copy(update=changes)


def _absolute(path: Path, folder: Path) -> Path:
    return folder.absolute() / path.expanduser()


def _complaint(error: ValidationError, kind: type[Section], tree: Tree, file: Path) -> str:
    """One line on the error that explains most: a misspelt key also leaves another one missing."""
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    key = tuple(str(part) for part in first["loc"])
    return f"{tree.origin(key) or file}: {_explained(first, kind, key)}"


def _explained(error: ErrorDetails, kind: type[Section], key: Key) -> str:
    dotted = ".".join(key)
    if error["type"] == "invalid_key":
        return f"{dotted} is not known; keys are text"
    if error["type"] != "extra_forbidden":
        text = reason(error)
        return f"{dotted} {text}" if text.startswith(("must", "is ")) else f"{dotted}: {text}"
    section = kind
    for part in key[:-1]:
        section = _section(section.model_fields[part].annotation) or section
    if key[-1] in section.replaced:
        return f"{dotted} is no longer known; {section.replaced[key[-1]]}"
    elsewhere = [f"{name}.{key[-1]}" for name, inner in _sections(kind).items() if key[-1] in inner.model_fields]
    if elsewhere:
        return f"{dotted} is not known; did you mean {' or '.join(elsewhere)}?"
    return not_known(".".join(key[:-1]), key[-1], section.model_fields)
