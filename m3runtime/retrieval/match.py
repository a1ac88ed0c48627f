"""`Match`: one memory that was chosen for a text."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """One memory that was chosen for a chunk."""

    id: int
    score: float
    stands_for: tuple[int, ...] = ()
    """Ids of memories that say the same: they are not chosen, and their places are cited."""
