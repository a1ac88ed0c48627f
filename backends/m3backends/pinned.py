"""`PinnedTier`: blocks in main memory, page-locked where there is a GPU to copy them to."""

import torch

from m3runtime.slab import SlabTier


class PinnedTier(SlabTier):
    """A slab in main memory. Where CUDA is available it is page-locked, so that a GPU reads it at full speed.

    ``capacity`` is in bytes; page-locked memory is taken at once and cannot be swapped out. Raises
    `ConfigError` if there is not so much.
    """

    def __init__(self, *, slot_bytes: int, capacity: int, eviction: str = "lru") -> None:
        super().__init__(
            name="pinned",
            slot_bytes=slot_bytes,
            capacity=capacity,
            eviction=eviction,
            device=torch.device("cpu"),
            page_locked=torch.cuda.is_available(),
        )
