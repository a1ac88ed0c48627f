"""`GpuTier` and `PinnedTier`: caching tiers in device memory and in page-locked RAM."""

import torch

from m3runtime.config.units import Size
from m3runtime.storage.slab import SlabTier


class GpuTier(SlabTier):
    """A slab where the runtime computes: in the memory of ``device``, or in RAM if that is the CPU.

    ``capacity`` is in bytes. Raises `ConfigError` if the device does not have so much.
    """

    def __init__(self, *, slot_bytes: int, capacity: Size, eviction: str = "lru", device: torch.device) -> None:
        super().__init__(name="gpu", slot_bytes=slot_bytes, capacity=capacity, eviction=eviction, device=device)


class PinnedTier(SlabTier):
    """A slab in RAM. It is page-locked if the runtime computes on a CUDA ``device``, which then reads it at full speed.

    ``capacity`` is in bytes; page-locked memory is taken at once and cannot be swapped out. Raises
    `ConfigError` if there is not so much.
    """

    def __init__(
        self,
        *,
        slot_bytes: int,
        capacity: Size,
        eviction: str = "lru",
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        super().__init__(
            name="pinned",
            slot_bytes=slot_bytes,
            capacity=capacity,
            eviction=eviction,
            device=torch.device("cpu"),
            locked_for=device if device.type == "cuda" else None,
        )
