"""Conditions on the metadata of places: ``recall.where``, ``--where`` and the field ``where`` of a request.

A mapping of names to values: ``{lang: en, team: [law, sales], year: {at_least: 2020, at_most: 2024}, source: docs/}``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SOURCE = "source"
"""The name that stands for a place's source; its values are sources or folders of sources."""
_LIMITS = ("at_least", "at_most", "prefix")
_MOST = 1000


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on one value of a place's metadata. Everything that is given must hold."""

    field: str
    values: frozenset[str] | None = None
    """The value is one of these."""
    at_least: str | None = None
    at_most: str | None = None
    """If all limits that are given are numbers, the value is a number between them; else texts are compared."""
    prefix: str = ""
    """The value begins with this."""

    def allows(self, value: str) -> bool:
        """Does a value meet the condition?"""
        if (self.values is not None and value not in self.values) or not value.startswith(self.prefix):
            return False
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        number, numbers = _number(value), [_number(limit) for limit in limits]
        if None in numbers:
            return (self.at_least is None or self.at_least <= value) and (self.at_most is None or value <= self.at_most)
        if limits and number is None:
            return False
        low, high = (None if limit is None else _number(limit) for limit in (self.at_least, self.at_most))
        return (low is None or low <= (number or 0)) and (high is None or (number or 0) <= high)


Where = frozenset[Condition]
"""Conditions that one place must meet together. None at all: every place does."""


def in_sources(names: Iterable[str]) -> Where:
    """The condition that a place is in one of these sources, or folders of sources."""
    return frozenset([Condition(SOURCE, frozenset(names))])


def conditions(where: object) -> Where:
    """The conditions of a mapping, as YAML or JSON has it.

    A value is a text, a list of texts, or a mapping with ``at_least``, ``at_most`` and ``prefix``. A number counts as
    its text. Raises `ValueError` with one line.
    """
    if not isinstance(where, Mapping):
        raise ValueError(f"must be a mapping of names to values, such as lang: en, not {_short(where)}")
    return frozenset(_condition(field, value) for field, value in where.items())


def as_mappings(where: Where) -> list[dict[str, Any]]:
    """A mapping for each condition, of which `conditions` makes it again: several may be on the same field."""

    def limits(one: Condition) -> dict[str, str]:
        said = {"at_least": one.at_least, "at_most": one.at_most, "prefix": one.prefix}
        return {name: text for name, text in said.items() if text is not None}

    return [{one.field: limits(one) if one.values is None else sorted(one.values)} for one in where]


def _condition(field: object, value: object) -> Condition:
    if not isinstance(field, str) or not field:
        raise ValueError(f"must have names of metadata as keys, not {_short(field)}")
    if isinstance(value, Mapping):
        if not value or not value.keys() <= set(_LIMITS):
            raise ValueError(f"must limit {field} by at_least, at_most or prefix, not by {_short(dict(value))}")
        limits: dict[str, Any] = {str(name): _text(field, limit) for name, limit in value.items()}
        return Condition(field, None, **limits)
    several = value if isinstance(value, list | tuple) else [value]
    if len(several) > _MOST:
        raise ValueError(f"must have at most {_MOST} values of {field}")
    return Condition(field, frozenset(_text(field, one) for one in several))


def _text(field: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must have a text, a list of texts or limits as the value of {field}, not {_short(value)}")
    return str(value)


def _short(value: object) -> str:
    return repr(value)[:60]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
