"""`every_tier`: each kind of tier and home that is installed, for ``m3 bench tiers --all``."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from m3runtime.config.schema import Config, TierConfig
from m3runtime.errors import PluginError
from m3runtime.lab.bench.servers import BUCKET, s3_server, valkey_server
from m3runtime.plugins.loading import load

_SLOTS = 64
"""Blocks that a caching tier has room for."""


@contextmanager
def every_tier(
    config: Config, block_bytes: int, url: str | None, valkey: str | None
) -> Iterator[tuple[Config, Mapping[str, TierConfig]]]:
    """A configuration with all caching tiers above LMDB, and the other homes by name.

    ``url`` is where tables may be made in an object store, and ``valkey`` a server. Without them servers are started,
    if they are installed. A kind that is not installed is left out.
    """
    room = f"{_SLOTS * (block_bytes + 4096)}B"
    with ExitStack() as stack:
        tiers = [{"kind": "pinned", "capacity": room}]
        if _is_installed("valkey") and (server := valkey or stack.enter_context(valkey_server())):
            tiers.append({"kind": "valkey", "url": server, "timeout": "10s"})
        tiers += [{"kind": "lmdb-cache", "capacity": room, "path": "cache"}, {"kind": "lmdb"}]
        others: dict[str, TierConfig] = {}
        if _is_installed("lance"):
            others["lance"] = TierConfig.model_validate({"kind": "lance"})
            if url is None:
                url = stack.enter_context(_own_store())
            if url is not None:
                others["lance, S3"] = TierConfig.model_validate({"kind": "lance", "url": url})
        found = tuple(TierConfig.model_validate(tier) for tier in tiers)
        yield config.model_copy(update={"tiers": found}), others


def _is_installed(kind: str) -> bool:
    try:
        load("tiers", kind)
    except PluginError:
        return False
    return True


@contextmanager
def _own_store() -> Iterator[str | None]:
    """The URL in an object store that is started here; None if it is not installed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="m3-bench-s3-")))
        try:
            variables = stack.enter_context(s3_server(folder))
        except PluginError:
            yield None
            return
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)  # the only way to tell the library
        try:
            yield f"s3://{BUCKET}/bench"
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
