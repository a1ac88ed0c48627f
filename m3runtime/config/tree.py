"""`Tree`: the values of a configuration before they are validated, and the origin of each."""

from collections.abc import Iterator, Mapping
from typing import Any

from m3runtime.errors import ConfigError

Key = tuple[str, ...]


class Tree:
    """Nested mappings and lists of plain values, to which overrides are applied one after the other."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values = values
        # An empty section says nothing about its keys.
        given = [key for key, value in leaves(values) if value != {} and (value is not None or len(key) > 1)]
        self._origins = dict.fromkeys(given, origin)

    def override(self, key: Key, value: Any, origin: str) -> None:
        """Set one value, or each value within a mapping. A list grows by at most one item.

        Raises `ConfigError` if a part of the key names no item of a list.
        """
        if isinstance(value, dict):
            for name, inner in value.items():
                self.override((*key, str(name)), inner, origin)
            return
        node: Any = self.values
        for part, following in zip(key, (*key[1:], None), strict=True):
            place = _place(node, part, ".".join(key), origin)
            if following is None:
                node[place] = value
            elif not isinstance(_get(node, place), dict | list):
                node[place] = [] if following.isdecimal() else {}
            node = node[place]
        self._origins.pop(key, None)  # the newest comes last
        self._origins[key] = origin

    def origin(self, key: Key) -> str | None:
        """The origin of the newest value at the key, within it, or of a list that it is part of."""
        for other, origin in reversed(self._origins.items()):
            shared = min(len(key), len(other))
            if key[:shared] == other[:shared]:
                return origin
        return None


def leaves(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is neither a mapping nor a list of mappings, with its key."""
    if isinstance(node, Mapping) and node:
        inner = [(str(name), value) for name, value in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        inner = [(str(number), value) for number, value in enumerate(node)]
    else:
        yield key, node
        return
    for name, value in inner:
        yield from leaves(value, (*key, name))


def _place(node: dict[str, Any] | list[Any], part: str, key: str, origin: str) -> Any:
    """The index that a part of a key means in a mapping or a list."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) > len(node):
        raise ConfigError(f"{origin}: {key} is not known; the list has {len(node)} items, counted from 0")
    if int(part) == len(node):
        node.append(None)
    return int(part)


def _get(node: Any, place: Any) -> Any:
    return node.get(place) if isinstance(node, dict) else node[place]
