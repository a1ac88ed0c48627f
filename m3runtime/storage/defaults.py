"""Defaults that fit the machine: of tiers, of decoded memories, and of an engine's room."""

import os
from pathlib import Path

import torch

from m3runtime.config.schema import TierConfig
from m3runtime.config.units import format_size
from m3runtime.storage.opening import HOME

_MIB = 1024**2
_GIB = 1024**3


def default_tiers(device: torch.device) -> tuple[TierConfig, ...]:
    """Tiers that fit this machine, for a runtime that computes on ``device``.

    On a CUDA device: an eighth of its memory, at most 2 GiB. Then an eighth of RAM, at most 8 GiB, and LMDB as the
    home.
    """
    tiers = [_tier("pinned", min(8 * _GIB, _ram() // 8)), HOME]
    if device.type == "cuda":
        tiers.insert(0, _tier("gpu", min(2 * _GIB, torch.cuda.get_device_properties(device).total_memory // 8)))
    return tuple(tiers)


def default_decoded(device: torch.device) -> int:
    """Bytes of decoded memories that fit ``device``: an eighth of its memory; on a CPU of RAM, and at most 2 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 8
    return min(2 * _GIB, _ram() // 8)


def default_room(device: torch.device) -> int:
    """Bytes of keys and values of an engine's rows: half of what is free on ``device``; on a CPU a quarter of RAM."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return _ram() // 4


def _tier(kind: str, capacity: int) -> TierConfig:
    whole = max(1, capacity // _MIB) * _MIB  # so that `m3 config` prints it readably
    return TierConfig.model_validate({"kind": kind, "capacity": format_size(whole)})


def _ram() -> int:
    """Bytes of RAM that this process may use, a container's limit included."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        memory = 8 * _GIB
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup, or `max`: no limit
        return memory
