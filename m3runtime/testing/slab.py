"""`SlabTierContract`: the contract of caching tiers, for one that is a `SlabTier`."""

import torch

from m3runtime.storage.slab import SlabTier
from m3runtime.storage.tier import Tier
from m3runtime.testing.caching import CachingTierContract


class SlabTierContract(CachingTierContract):
    """Subclass it as ``TestMyTier`` and say how to make the tier. The back door is the slab and its table."""

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        """The slot of ``id``; see `TierContract.raw_read`."""
        assert isinstance(tier, SlabTier)
        assert tier._slab is not None
        slot = tier._held.get(id)
        return None if slot is None else bytes(tier._slab[slot].tolist())

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        """Fill the next free slot, and tell table and policy; see `TierContract.raw_write`."""
        assert isinstance(tier, SlabTier)
        assert tier._slab is not None
        if id not in tier._held:
            tier._held[id] = tier._free.pop()
            tier._policy.admitted(id)
        slot = tier._slab[tier._held[id]]
        slot[: len(block)] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
