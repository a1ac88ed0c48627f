"""The record of a bank's erasures, by which one that was killed is finished, and others are known to be done.

The home's record ``erasures`` is JSON, without anything of what was forgotten::

    {"begun": false, "done": [{"at": "2026-03-01T12:00:00+00:00", "memories": 3}]}
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from m3runtime.errors import RecordError
from m3runtime.memory.spec import canonical_json
from m3runtime.storage.home import Home

_RECORD = "erasures"


@dataclass(frozen=True, slots=True)
class Erasure:
    """One erasure that was done."""

    at: str
    """When it ended: ISO 8601, in UTC."""
    memories: int
    """Memories that were forgotten or replaced since the erasure before, or since the bank was made."""


@dataclass(frozen=True, slots=True)
class Erasures:
    """The erasures of a bank."""

    begun: bool = False
    """Did one begin that has not ended? Then files may have bytes of what was forgotten."""
    done: tuple[Erasure, ...] = ()

    @classmethod
    def of(cls, home: Home) -> "Erasures":
        """The erasures that the home records. If the record is damaged, one has begun and none is known."""
        try:
            stored = home.get_meta(_RECORD)
            if stored is None:
                return cls()
            stated = json.loads(stored)
            return cls(bool(stated["begun"]), tuple(Erasure(**one) for one in stated["done"]))
        except (RecordError, ValueError, KeyError, TypeError, RecursionError):
            return cls(begun=True)

    def write(self, home: Home) -> None:
        """Store the record. Raises `BankFullError` and `TierReadOnlyError`."""
        home.set_meta(_RECORD, canonical_json(asdict(self)).encode())

    def with_one_begun(self) -> "Erasures":
        """These, and one that begins."""
        return replace(self, begun=True)

    def with_one_done(self, home: Home) -> "Erasures":
        """These, and one that has just ended."""
        remembered = len(home.ids()) + len(home.quarantined())
        before = sum(one.memories for one in self.done)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        ever = home.next_id() - home.unused()
        return Erasures(False, (*self.done, Erasure(at, ever - remembered - before)))
