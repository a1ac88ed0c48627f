"""`SourceState`: how a source was when it was written, so that an unchanged one is not read again."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceState:
    """A file as it was when all that it says was remembered, and nothing else of it."""

    size: int
    """Bytes."""
    time: int
    """Nanoseconds of its last change; 0 where they do not tell, because it changed while or just before it was read."""
    digest: str
    """The digest of its bytes."""
    how: str
    """How it was read and split: with other settings it gives other references."""
