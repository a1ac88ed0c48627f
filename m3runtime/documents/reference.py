"""`Reference`: a text that is remembered, the unit of memory."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reference:
    """A text that is remembered. ``start`` and ``end`` count characters of the text of ``source``."""

    text: str
    source: str
    start: int
    end: int
    tokens: int
