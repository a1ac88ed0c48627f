"""Makes an object of a plug-in's class from the options in a section of the configuration."""

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from m3runtime.errors import ConfigError
from m3runtime.plugins.messages import not_known, reason

T = TypeVar("T")


def construct(kind: type[T], options: Mapping[str, Any], where: str, **given: Any) -> T:
    """Make a ``kind`` from a section's options and from what the runtime gives.

    The options are read as `read_options` does. Raises `ConfigError` for one that is unknown, missing or wrong.
    """
    read = read_options(kind, options, where, **given)
    for name, parameter in _named(kind, given).items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{where}.{name} is missing")
    return kind(**read, **given)


def read_options(kind: type, options: Mapping[str, Any], where: str, **given: Any) -> dict[str, Any]:
    """A section's options as the types that the constructor of ``kind`` annotates.

    A parameter annotated `m3runtime.config.units.Size` takes ``2GiB``, one annotated ``Seconds`` takes ``50ms``, and
    so on with every type that pydantic knows. A value whose parameter has no annotation, or one that pydantic cannot
    check, stays as it is. ``where`` is the section's key, for messages; names in ``given`` are no options. Raises
    `ConfigError` for an option that is unknown or wrong.
    """
    named = _named(kind, given)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(kind))
    for name in options:
        if name in given or not (name in named or takes_any):
            raise ConfigError(not_known(where, name, named))
    types = {name: _annotation(kind, parameter) for name, parameter in named.items()}
    return {
        name: _checked(value, types.get(name, inspect.Parameter.empty), f"{where}.{name}")
        for name, value in options.items()
    }


def _named(kind: type, given: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters that an option may set."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one.name: one for one in _parameters(kind) if one.kind in by_name and one.name not in given}


def _parameters(kind: type) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())


def _checked(value: Any, annotation: Any, key: str) -> Any:
    """The value as the annotated type."""
    if annotation is inspect.Parameter.empty or not isinstance(value, str | int | float | list | dict | None):
        return value  # anything may come, or the value is not out of a configuration
    try:
        check: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that pydantic cannot check, or one with a configuration of its own
        return value
    try:
        return check.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{key} {reason(error.errors()[0])}") from None


def _annotation(kind: type, parameter: inspect.Parameter) -> Any:
    """The type that a parameter is annotated with; ``empty`` if there is none, or only type checkers import it."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    alone = SimpleNamespace(__annotations__={"type": parameter.annotation})  # or one that fails would fail them all
    try:
        return get_type_hints(alone, getattr(kind.__init__, "__globals__", {}), include_extras=True)["type"]
    except NameError:
        return parameter.empty
