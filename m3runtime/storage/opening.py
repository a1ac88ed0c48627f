"""`open_home`: the home of a configured bank, opened without its caching tiers, and without torch."""

from collections.abc import Callable
from functools import partial

from m3runtime.config.schema import Config, TierConfig
from m3runtime.errors import ConfigError
from m3runtime.plugins.construction import construct
from m3runtime.plugins.loading import load
from m3runtime.storage.home import Home

HOME = TierConfig(kind="lmdb")
"""The home of a configuration that names no tiers."""


def open_home(config: Config, *, read_only: bool = False) -> Callable[..., Home]:
    """The function that opens the home in the folder ``path``, or makes one with slots of ``slot_bytes``.

    Raises `ConfigError` if the last tier is no home.
    """
    configured = config.tiers or (HOME,)
    kind, options = load("tiers", configured[-1].kind), configured[-1].options
    if not issubclass(kind, Home):
        raise ConfigError(f"tiers: the last one must be a home, and {configured[-1].kind} is none")
    return partial(construct, kind, options, f"tiers.{len(configured) - 1}", slot_bytes=None, read_only=read_only)
