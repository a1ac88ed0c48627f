"""Eviction policies: they choose the block that a full caching tier evicts. Plain Python over ids."""

from m3runtime.errors import ConfigError
from m3runtime.storage.eviction.base import EvictionPolicy, anything
from m3runtime.storage.eviction.lru import LruPolicy
from m3runtime.storage.eviction.s3fifo import S3FifoPolicy
from m3runtime.storage.eviction.scored import ScoredPolicy

__all__ = [
    "POLICIES",
    "EvictionPolicy",
    "LruPolicy",
    "S3FifoPolicy",
    "ScoredPolicy",
    "anything",
    "make_policy",
]

POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LruPolicy, "s3-fifo": S3FifoPolicy, "score": ScoredPolicy}
"""By their names in the configuration."""


def make_policy(name: str, slots: int) -> EvictionPolicy:
    """A policy by its name in the configuration, for a tier of ``slots`` blocks. Raises `ConfigError`."""
    if name not in POLICIES:
        raise ConfigError(f"eviction must be one of {', '.join(POLICIES)}, not {name!r}")
    return POLICIES[name](slots)
