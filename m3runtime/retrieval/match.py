"""`Match`: one memory that was chosen for a text."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """One memory that was chosen for a chunk."""

    id: int
    score: float
