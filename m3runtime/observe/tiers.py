"""`TierStats`: the counters of one tier."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier did in a hierarchy. Each count only grows.

    `Hierarchy.read` asks the first tier for every block, and each other one for the ``misses`` and the
    ``unanswered`` of the one before. What it asks a tier for is ``hits + misses + unanswered``, and ``bytes`` is
    ``hits`` slots. Bad blocks are misses too, unless `Hierarchy.lift` met them.
    """

    name: str
    hits: int = 0
    """Blocks that `Hierarchy.read` got from this tier."""
    misses: int = 0
    bytes: int = 0
    """Bytes of the slots that were found."""
    lifted: int = 0
    """Blocks that `Hierarchy.lift` got from this tier."""
    faults: int = 0
    """Calls that ended in a `TierError` (of the home: or a `BankError`), whatever they were for."""
    bad_blocks: int = 0
    """Blocks that failed their check, in the home twice in a row. They are set apart."""
    recovered: int = 0
    """Blocks of the home that failed their check, and passed it when they were read once more."""
    unanswered: int = 0
    """Blocks that `Hierarchy.read` wanted from this tier while it failed, or had yet to discard what is forgotten."""
