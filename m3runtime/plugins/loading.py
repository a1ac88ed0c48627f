"""Plug-ins: backends by the name of their entry point or by import path, and how they are constructed."""

import inspect
import re
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails

from m3runtime.errors import ConfigError, PluginError

T = TypeVar("T")

_GROUPS = {
    "tiers": "tier",
    "codecs": "codec",
    "indexes": "index",
    "embedders": "embedder",
    "adapters": "adapter",
    "trainers": "trainer",
}
_EXTRAS = {
    "faiss": ("train",),
    "transformers": ("transformers", "memory3"),
    "accelerate": ("transformers", "memory3"),
    "gguf": ("transformers",),
    "sentence_transformers": ("sentence-transformers",),
    "FlagEmbedding": ("bge",),
    "matplotlib": ("eval",),
    "rapidfuzz": ("eval", "memory3"),
    "scipy": ("eval",),
    "tensorboard": ("memory3",),
}
"""Modules, and the extras that bring them."""


def load(group: str, name: str) -> type[Any]:
    """The class that a plug-in's name, or an import path ``package.module:Name``, stands for. Raises `PluginError`.

    ``group`` is one of ``tiers``, ``codecs``, ``indexes``, ``embedders``, ``adapters`` and
    ``trainers``.
    """
    what = f"{_GROUPS[group]} {name}"
    module, _, attribute = name.partition(":") if ":" in name else _find(group, name)
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise PluginError(f"{what} is not an import path such as package.module:Name")
    found = _import(module, what)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise PluginError(f"{what}: module {module} has no {attribute}") from None
    if not isinstance(found, type):
        raise PluginError(f"{what}: {module}:{attribute} is not a class")
    return found


def available(group: str) -> list[str]:
    """The names that `load` knows in a group, besides import paths."""
    return sorted({entry.name for entry in _entries(group)})


def construct(kind: type[T], options: Mapping[str, Any], where: str, **given: Any) -> T:
    """Make a ``kind`` from the options of a section of the configuration and from what the runtime gives.

    ``where`` is the section's key, for messages. Options are checked against the constructor's parameters and
    their types. Raises `ConfigError` for one that is not known, is missing or is wrong.
    """
    parameters = _parameters(kind)
    named = {
        p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in options:
        if name in given or not (name in named or takes_any):
            raise ConfigError(not_known(where, name, named))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{where}.{name} is missing")
    checked = {name: _checked(value, named.get(name), f"{where}.{name}") for name, value in options.items()}
    return kind(**checked, **given)


def require(what: str, extra: str) -> None:
    """Raise `PluginError`, with what to install, unless every module of an extra is there. Imports none."""
    for module, extras in _EXTRAS.items():
        if extra in extras and find_spec(module) is None:
            raise PluginError(f"{what} needs {module}: pip install 'm3runtime[{extra}]'")


def not_known(where: str, name: str, choices: Iterable[str]) -> str:
    """The message for a key that is not among those of the section ``where`` (empty: of the whole)."""
    prefix = f"{where}." if where else ""
    known = sorted(choices)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
    return f"{prefix}{name} is not known; {hint}"


def reason(error: ErrorDetails) -> str:
    """What is wrong with a value, to be read after its key: ``must be ..., not ...``."""
    match error["type"]:
        case "missing":
            return "is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            must = "must be a mapping of keys to values"
        case "tuple_type" | "list_type":
            must = "must be a list"
        case _:
            must = re.sub(r"^\w+ should", "must", error["msg"])
    return f"{must}, not {reprlib.repr(error['input'])}"


@cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"m3runtime.{group}"))


def _find(group: str, name: str) -> tuple[str, str, str]:
    """Module, colon and attribute of the entry point with that name."""
    values = sorted({f"{entry.module}:{entry.attr}" for entry in _entries(group) if entry.name == name})
    if len(values) > 1:
        raise PluginError(f"{_GROUPS[group]} {name} is provided twice; use an import path: {' or '.join(values)}")
    if values:
        return values[0].partition(":")
    choices = available(group)
    if not choices:
        raise PluginError(f"no {_GROUPS[group]} is installed, so not even m3runtime's own: pip install m3runtime")
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PluginError(
        f"{_GROUPS[group]} {name} is not known; {hint}"
        f"There are {', '.join(choices)}, and import paths package.module:Name"
    )


def _import(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _EXTRAS:
            raise PluginError(f"{what} needs {missing}: pip install 'm3runtime[{_EXTRAS[missing][0]}]'") from error
        if missing == module.partition(".")[0]:
            raise PluginError(f"{what}: no module {error.name}; is its folder on PYTHONPATH?") from error
        raise PluginError(f"{what} needs {missing}, which is not installed") from error
    except ImportError as error:
        raise PluginError(f"{what} cannot be imported: {' '.join(str(error).split())}") from error


def _parameters(kind: type) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(kind, eval_str=True)
    except NameError:  # a type that only type checkers import
        signature = inspect.signature(kind)
    return list(signature.parameters.values())


def _checked(value: Any, parameter: inspect.Parameter | None, key: str) -> Any:
    """The value as what the parameter is annotated with."""
    if parameter is None or isinstance(parameter.annotation, str) or parameter.annotation is parameter.empty:
        return value
    if not isinstance(value, str | int | float | list | dict | None):
        return value  # not out of a configuration
    try:
        check: TypeAdapter[Any] = TypeAdapter(parameter.annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that pydantic cannot check, or brings a configuration of its own
        return value
    try:
        return check.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{key} {reason(error.errors()[0])}") from None
