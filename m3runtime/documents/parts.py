"""`Part`: a piece of a document that has a place of its own, such as a page or a row; `located` cites the places."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from m3runtime.documents.reference import Place, Reference

_BLOCK = 1 << 16
"""Characters of parts that are split together."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a document's text, which is that of its parts in a row."""

    text: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """See `Place.metadata`."""


Read = Callable[[Path], Iterator[Part]]
"""Reads a file part by part. Raises `InputError` for a file that it cannot read, in one line that names it."""


def located(parts: Iterable[Part], split: Callable[[Iterable[str]], Iterable[Reference]]) -> Iterator[Reference]:
    """The references that ``split`` makes of a text, in order, each with the metadata of the parts that it is in.

    A reference on pages 3 and 4 has the page ``3–4``. Memory is bounded as far as that of ``parts`` and ``split`` is.
    """
    marks: deque[tuple[int, Mapping[str, str]]] = deque()

    def texts() -> Iterator[str]:
        end, waiting, size = 0, list[str](), 0
        for part in parts:
            marks.append((end, part.metadata))
            end += len(part.text)
            waiting.append(part.text)
            size += len(part.text)
            if size >= _BLOCK:
                yield "".join(waiting)
                waiting, size = [], 0
        yield "".join(waiting)

    for reference in split(texts()):
        yield replace(reference, places=tuple(_located(place, marks) for place in reference.places))


def _located(place: Place, marks: deque[tuple[int, Mapping[str, str]]]) -> Place:
    while len(marks) > 1 and marks[1][0] <= place.start:
        marks.popleft()
    first, last = dict[str, str](), dict[str, str]()
    for start, metadata in marks:
        if start >= place.end:
            break
        first = {**metadata, **first}
        last |= metadata
    joined = {key: one if one == last[key] else f"{one}–{last[key]}" for key, one in first.items()}
    return replace(place, metadata={**place.metadata, **joined})
