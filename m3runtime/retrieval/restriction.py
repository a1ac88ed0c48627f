"""`Restriction`: limits on the memories of one stream, within those of the configuration."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Restriction:
    """The memories that a stream may read. None: as the configuration says."""

    memories: int | None = None
    """Most memories of a chunk, if that is less than ``recall.memories``."""
    min_score: float | None = None
    """Memories that score lower are not recalled; in place of ``recall.min_score``."""
    sources: frozenset[str] | None = None
    """Only memories that have a place in one of these sources. The search itself looks at no others."""


UNRESTRICTED = Restriction()
