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

    Each option becomes the type that the constructor annotates: a parameter annotated `m3runtime.config.units.Size`
    takes ``2GiB``, one annotated ``Seconds`` takes ``50ms``, and so on with every type that pydantic knows. An option
    stays as it is if its parameter has no annotation, or one that pydantic cannot check. ``where`` is the section's
    key, for messages. Raises `ConfigError` for an option that is unknown, missing or wrong.
    """
    parameters = inspect.signature(kind).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {one.name: one for one in parameters if one.kind in by_name and one.name not in given}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for name in options:
        if name in given or not (name in named or takes_any):
            raise ConfigError(not_known(where, name, named))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{where}.{name} is missing")
    types = {name: _annotation(kind, named[name]) if name in named else Any for name in options}
    checked = {name: _checked(value, types[name], f"{where}.{name}") for name, value in options.items()}
    return kind(**checked, **given)


def _annotation(kind: type, parameter: inspect.Parameter) -> Any:
    """The type that a parameter is annotated with; ``Any`` if there is none, or only type checkers import it."""
    if not isinstance(parameter.annotation, str):
        return Any if parameter.annotation is parameter.empty else parameter.annotation
    names = getattr(inspect.getattr_static(kind, "__init__"), "__globals__", {})
    alone = SimpleNamespace(__annotations__={"type": parameter.annotation})  # or one that fails would fail them all
    try:
        return get_type_hints(alone, names, include_extras=True)["type"]
    except NameError:
        return Any


def _checked(value: Any, annotation: Any, key: str) -> Any:
    """The value as the annotated type."""
    if not isinstance(value, str | int | float | list | dict | None):
        return value  # not out of a configuration
    try:
        check: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that pydantic cannot check, or one with a configuration of its own
        return value
    try:
        return check.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{key} {reason(error.errors()[0])}") from None
