"""`CheckedHome`: the home as the hierarchy uses it. Its faults are counted and, where a block is wanted, raised."""

import numpy as np
import torch
from torch import Tensor

from m3runtime.errors import BankError, TierError, TierReadOnlyError
from m3runtime.memory.block import Found, Ids, Stamps
from m3runtime.storage.checked_tier import CheckedTier
from m3runtime.storage.home import Home


class CheckedHome(CheckedTier):
    """The home, whose blocks are all checked.

    A block that is bad is read once more, for the drive or the way from it may have erred. One that is bad twice is
    quarantined.
    """

    def __init__(self, home: Home, stamp: Stamps) -> None:
        super().__init__(home, stamp, is_checked=True)
        self.home = home

    def remembered(self, ids: Ids) -> Found | None:
        """``bool[n]``: the ids that the home has; None if it fails."""
        try:
            return self.home.contains(ids)
        except (TierError, BankError):
            self.count(faults=1)
            return None

    def discard(self, ids: Ids) -> None:
        """Forget these blocks in the home. Raises what the home raises."""
        try:
            self.home.discard(ids)
        except (TierError, BankError):
            self.count(faults=1)
            raise

    def quarantine(self, id: int, reason: str) -> None:
        """Quarantine a block. Where the home cannot, the block stays a miss, since every reading is checked."""
        try:
            self.home.quarantine(id, reason)
        except TierReadOnlyError:
            return
        except (TierError, BankError):
            self.count(faults=1)

    def _read(self, ids: Ids, out: Tensor) -> Found:
        found = self._ask(ids, out)
        bad = self._bad(ids, out, found)
        if not bad:
            return found
        found, rows = found.copy(), np.array(list(bad))
        again = torch.zeros((len(rows), self.home.slot_bytes), dtype=torch.uint8)
        found[rows] = self._ask(ids[rows], again)
        bad = {int(rows[row]): reason for row, reason in self._bad(ids[rows], again, found[rows]).items()}
        found[list(bad)] = False
        healed = found[rows]
        out[torch.from_numpy(rows[healed])] = again[torch.from_numpy(healed)]
        self.count(bad_blocks=len(bad), recovered=int(healed.sum()))
        for row, reason in bad.items():
            self.quarantine(int(ids[row]), reason)
        return found

    def _ask(self, ids: Ids, out: Tensor) -> Found:
        try:
            return self.home.read(ids, out)
        except (TierError, BankError):
            self.count(faults=1)
            raise
