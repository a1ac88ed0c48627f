"""`GpuTier` and `PinnedTier`: caching tiers in device memory and in page-locked RAM."""

import torch

from m3runtime.config.units import Size
from m3runtime.errors import ConfigError
from m3runtime.storage.slab import SlabTier


class GpuTier(SlabTier):
    """A slab on an accelerator.

    ``device`` is ``auto`` (the accelerator that torch found), or a torch device such as ``cuda:1``, or
    ``cpu``, which serves machines without an accelerator. Raises `ConfigError` if the device is not there,
    or has not ``capacity`` bytes free.
    """

    def __init__(self, *, slot_bytes: int, capacity: Size, eviction: str = "lru", device: str = "auto") -> None:
        super().__init__(
            name="gpu",
            slot_bytes=slot_bytes,
            capacity=capacity,
            eviction=eviction,
            device=find_device(device),
        )


def find_device(name: str) -> torch.device:
    """The device of that name, with its number. Raises `ConfigError` if there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        if accelerator is None:
            raise ConfigError("tier gpu: there is no accelerator; leave this tier out or set `device: cpu`")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"tier gpu: {name!r} is not a device, such as auto, cuda, cuda:1 or cpu") from error
    if device.type == "cpu":
        return device
    if accelerator is None or accelerator.type != device.type:
        raise ConfigError(f"tier gpu: there is no {name!r} here; set `device: cpu` or leave this tier out")
    number = device.index or 0
    if number >= torch.accelerator.device_count():
        raise ConfigError(f"tier gpu: there is no {name!r} here, only {torch.accelerator.device_count()}")
    return torch.device(device.type, number)


class PinnedTier(SlabTier):
    """A slab in main memory. Where CUDA is available it is page-locked, so that a GPU reads it at full speed.

    ``capacity`` is in bytes; page-locked memory is taken at once and cannot be swapped out. Raises
    `ConfigError` if there is not so much.
    """

    def __init__(self, *, slot_bytes: int, capacity: Size, eviction: str = "lru") -> None:
        super().__init__(
            name="pinned",
            slot_bytes=slot_bytes,
            capacity=capacity,
            eviction=eviction,
            device=torch.device("cpu"),
            page_locked=torch.cuda.is_available(),
        )
