"""`TierStats`: the counters of one tier."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """The counters of one tier in a hierarchy. Each count only grows.

    `Hierarchy.read` requests every block from the first tier, and from each other tier the ``misses`` and the
    ``unanswered`` of the tier before. So ``hits + misses + unanswered`` are the requests to a tier, and ``bytes`` is
    the size of ``hits`` slots. Bad blocks count as misses too, unless `Hierarchy.lift` found them.
    """

    name: str
    hits: int = 0
    """Blocks that `Hierarchy.read` got from this tier."""
    misses: int = 0
    bytes: int = 0
    """Bytes of the slots that were hit."""
    lifted: int = 0
    """Blocks that `Hierarchy.lift` got from this tier."""
    faults: int = 0
    """Calls that raised a `TierError`, or a `BankError` from the home."""
    bad_blocks: int = 0
    """Blocks that failed their check (in the home twice in a row), and were quarantined."""
    recovered: int = 0
    """Blocks of the home that failed their check, and passed it when they were read again."""
    unanswered: int = 0
    """Blocks requested from this tier while it failed, or had yet to discard forgotten blocks."""
