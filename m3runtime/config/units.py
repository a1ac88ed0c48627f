"""Sizes such as ``2GiB`` and times such as ``50ms``, as people write them in the configuration."""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)\s*([A-Za-z]*)", re.ASCII)
_SIZES = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZES_BY_NAME = {name.lower(): size for name, size in _SIZES.items()}
_TIMES = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_MOST = 10**18


def parse_size(value: object) -> int:
    """Bytes of ``2GiB``, ``512 MiB``, ``1GB`` or a plain number of bytes. Raises `ValueError` in one clear line."""
    parsed = _parse(value)
    if parsed is not None and (parsed[1] or "b").lower() in _SIZES_BY_NAME:
        size = parsed[0] * _SIZES_BY_NAME[(parsed[1] or "b").lower()]
        if size.denominator == 1:
            return int(size)
    raise ValueError(f"must be a size such as 512MiB, 2GiB or a whole number of bytes, not {value!r}")


def format_size(size: int) -> str:
    """The spelling of a size with the largest unit that keeps it exact."""
    exact = (name for name, unit in _SIZES.items() if size and size % unit == 0)
    unit = max(exact, key=_SIZES.__getitem__, default="B")
    return f"{size // _SIZES[unit]}{unit}"


def parse_count(value: object) -> int:
    """A whole number, at least 1, of ``1000``, ``1e8`` or ``1.12e8``. Raises `ValueError` in one clear line."""
    parsed = _parse(value)
    if parsed is None or parsed[1] or parsed[0].denominator != 1 or not 1 <= parsed[0] <= _MOST:
        raise ValueError(f"must be a whole number such as 1000 or 1e8, from 1 to 1e18, not {value!r}")
    return int(parsed[0])


def parse_seconds(value: object) -> float:
    """Seconds of ``50ms``, ``1.5s``, ``2m``, ``1h`` or a plain number. Raises `ValueError` in one clear line."""
    parsed = _parse(value)
    if parsed is not None and (parsed[1] or "s") in _TIMES:
        try:
            return float(parsed[0] * _TIMES[parsed[1] or "s"])
        except OverflowError:
            pass  # longer than any float: as wrong as no time at all
    raise ValueError(f"must be a time such as 50ms, 1.5s, 2m or a number of seconds, not {value!r}")


def format_seconds(seconds: float) -> str:
    """The spelling of a time that `parse_seconds` reads back to the same float."""
    exact = Decimal(repr(seconds))
    if 0 < seconds < 1:
        return f"{_plain(exact * 1000)}ms"
    if seconds and seconds % 60 == 0:
        return f"{_plain(exact / 60)}m"
    return f"{_plain(exact)}s"


def _parse(value: object) -> tuple[Fraction, str] | None:
    """A number and its unit; None for what is not one, or is negative or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _NUMBER.fullmatch(str(value).strip())
    return None if match is None else (Fraction(match[1]), match[2])


def _plain(number: Decimal) -> str:
    return format(number.normalize(), "f")


Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size, return_type=str)]
"""A number of bytes, written as a size."""

Seconds = Annotated[float, BeforeValidator(parse_seconds), PlainSerializer(format_seconds, return_type=str)]
"""A number of seconds, written as a time."""
