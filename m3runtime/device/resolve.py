"""`resolve`: the one place that asks torch which devices this machine has."""

import torch

from m3runtime.errors import ConfigError


def resolve(name: str, key: str = "model.device") -> torch.device:
    """The device of this name; an accelerator always has its index.

    ``auto`` is the accelerator, or the CPU on a machine without one. ``cuda`` without a number is the calling thread's
    current device, so the result is kept and handed on, and no name is resolved twice. ``key`` is the configuration's
    key, for the message. Raises `ConfigError` for a device that this machine does not have.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key}: no device {name!r} on this machine") from None
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index
    if accelerator is not None and index is None:
        index = torch.accelerator.current_device_index()
    if accelerator is None or accelerator.type != device.type or index >= torch.accelerator.device_count():
        raise ConfigError(f"{key}: no device {name!r} on this machine")
    return torch.device(device.type, index)
