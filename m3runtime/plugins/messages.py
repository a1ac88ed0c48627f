"""Messages about keys and values that a user wrote, one line each."""

import re
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from pydantic_core import ErrorDetails, ValidationError


def not_known(where: str, name: str, choices: Iterable[str]) -> str:
    """The message for a key that is not one of ``choices``, the keys of the section ``where`` (empty: the top)."""
    prefix = f"{where}." if where else ""
    known = sorted(choices)
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
    return f"{prefix}{name} is not known; {hint}"


def reason(error: ErrorDetails) -> str:
    """The fault of a value, to be read after its key: ``must be ..., not ...``."""
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


def first_fault(error: ValidationError) -> str:
    """The key of the first value that pydantic refused, and `reason`."""
    first = error.errors()[0]
    return " ".join([*map(str, first["loc"]), reason(first)])


def difference(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """The entries in which two mappings differ, such as ``tokens 128 against 64``; empty for equal ones."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {ours.get(key)} against {theirs.get(key)}" for key in keys)


def one_line(value: object) -> str:
    """At most 200 printable ASCII characters of a value, for messages about what a file states."""
    return " ".join(ascii(str(value)[:200])[1:-1].split())
