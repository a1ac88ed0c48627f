"""`Match`: one memory that was chosen for a text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from m3runtime.documents.reference import Reference

References = Callable[[Sequence[int]], Mapping[int, Reference]]
"""The references of those ids that are remembered."""


@dataclass(frozen=True, slots=True)
class Match:
    """One memory that was chosen for a chunk."""

    id: int
    score: float
    stands_for: tuple[int, ...] = ()
    """Ids of memories that say the same: they are not chosen, and their places are cited."""
