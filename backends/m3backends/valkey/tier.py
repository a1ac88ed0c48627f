"""`ValkeyTier`: a caching tier in a Valkey or Redis server that many processes share."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import valkey
from torch import Tensor
from valkey.backoff import NoBackoff
from valkey.retry import Retry

from m3backends.guard import Guard
from m3backends.valkey.breaker import Breaker
from m3runtime.config.units import Seconds
from m3runtime.errors import ConfigError, TierError
from m3runtime.memory.block import HEADER_BYTES, Found, Ids, headers
from m3runtime.storage.tier import CachingTier, check_rows, read_by_host

T = TypeVar("T")

_PIECE = 8 << 20
"""Bytes of blocks in one request."""
_KEYS = 1000
"""Keys in one request without blocks."""


class ValkeyTier(CachingTier):
    """Blocks under ``m3:BANK:ID`` in the server at ``url``, which any number of processes share.

    The server bounds the memory and evicts: set its ``maxmemory``, and ``maxmemory-policy allkeys-lru``. ``url`` is
    ``valkey://``, ``valkeys://`` (TLS), ``redis://``, ``rediss://`` or ``unix://``, with user and password if it needs
    them. ``timeout`` bounds each wait for the server in seconds.

    A server that cannot be reached, or does not answer in time, is a `TierError`, which a hierarchy counts and goes on
    without the tier. It is then not asked at all for half a second, and for up to 30 seconds if it stays away: see
    `Breaker`. Thread-safe. Raises `ConfigError` for an address that is none; connecting waits for the first use.
    """

    name = "valkey"
    can_rot = True
    device = torch.device("cpu")
    capacity = None

    def __init__(
        self, *, slot_bytes: int, url: str = "valkey://localhost:6379", timeout: Seconds = 0.25, bank: str = ""
    ) -> None:
        self.slot_bytes = slot_bytes
        self._prefix = f"m3:{bank}:"
        self._breaker = Breaker()
        self._guard = Guard(f"tier {self.name} is closed")
        try:
            self._client: Any = valkey.Valkey.from_url(  # its types mix it with its asynchronous twin
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 1),  # a pooled connection that the server has closed meanwhile
                retry_on_error=[valkey.ConnectionError],
            )
        except ValueError as error:
            raise ConfigError(f"tier {self.name}: {error}") from error
        where = self._client.connection_pool.connection_kwargs
        self._where = where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"  # no password

    def ids(self) -> Ids:
        """All ids held; see `Persistent`. It asks the server for all keys, a thousand at a time."""
        begin = len(self._prefix)
        keys = self._call(lambda client: {*client.scan_iter(match=f"{self._prefix}{'[0-9a-f]' * 16}", count=_KEYS)})
        return np.array([int(key[begin:], 16) for key in keys], np.uint64)

    def read(self, ids: Ids, out: Tensor) -> Found:
        """Copy held blocks into ``out``, and zeros behind them; see `Tier.read`."""
        check_rows(ids, out, self.slot_bytes)
        if out.device.type != "cpu":
            return read_by_host(self, ids, out)
        found, rows_out = np.zeros(len(ids), np.bool_), out.numpy()
        values = self._call(
            lambda client: [one for some in self._pieces(ids) for one in client.mget(self._keys(some))], ids
        )
        for row, value in enumerate(values):
            if value is not None:
                stored = np.frombuffer(value, np.uint8)[: self.slot_bytes]
                rows_out[row, : len(stored)] = stored
                rows_out[row, len(stored) :] = 0
                found[row] = True
        return found

    def write(self, ids: Ids, blocks: Tensor) -> None:
        """Hold these blocks; see `Tier.write`. Raises `TierError` if the server has no room and may evict nothing."""
        check_rows(ids, blocks, self.slot_bytes)
        rows = blocks.cpu().numpy()
        ends = HEADER_BYTES + headers(rows)["payload"].astype(np.int64) if len(rows) else ()
        whole = [np.ascontiguousarray(row[: int(end)]) for row, end in zip(rows, ends, strict=True)]

        def work(client: Any) -> None:
            done = 0
            for some in self._pieces(ids):
                pipeline = client.pipeline(transaction=False)
                for key, block in zip(self._keys(some), whole[done : done + len(some)], strict=True):
                    pipeline.set(key, block.data, nx=True)  # what is held stays
                refused = [one for one in pipeline.execute(raise_on_error=False) if isinstance(one, Exception)]
                if refused:
                    raise refused[0]
                done += len(some)

        self._call(work, ids)

    def discard(self, ids: Ids) -> None:
        """Delete these blocks, for all who share the server; see `Tier.discard`."""

        def work(client: Any) -> None:
            for start in range(0, len(ids), _KEYS):
                client.delete(*self._keys(ids[start : start + _KEYS]))

        self._call(work, ids)

    def contains(self, ids: Ids) -> Found:
        """The ids that are held; see `Tier.contains`."""

        def work(client: Any) -> list[int]:
            pipeline = client.pipeline(transaction=False)
            for key in self._keys(ids):
                pipeline.exists(key)
            return pipeline.execute()  # type: ignore[no-any-return]

        return np.array(self._call(work, ids), np.bool_)

    def close(self) -> None:
        """Wait for running calls and close all connections; see `Tier.close`."""
        with self._guard.alone(closing=True):
            self._client.close()

    def __len__(self) -> int:
        return len(self.ids())

    def _call(self, work: Callable[[Any], T], ids: Ids | None = None) -> T:
        """Call ``work`` and return its result. Raises `TierError`, at once while the server is left alone."""
        with self._guard.shared():
            if ids is not None and not len(ids):
                return work(self._client)  # which asks the server for nothing
            if not self._breaker.lets():
                raise TierError(f"tier {self.name}: {self._where} failed, and is not asked again yet")
            try:
                result = work(self._client)
            except (valkey.ConnectionError, valkey.TimeoutError, OSError) as error:
                self._breaker.failed()
                raise TierError(f"tier {self.name}: {self._where}: {error}") from error
            except valkey.ValkeyError as error:
                raise TierError(f"tier {self.name}: {self._where}: {error}") from error
            self._breaker.succeeded()
            return result

    def _keys(self, ids: Ids) -> list[str]:
        return [f"{self._prefix}{id:016x}" for id in ids.tolist()]

    def _pieces(self, ids: Ids) -> Iterator[Ids]:
        size = max(1, _PIECE // self.slot_bytes)
        return (ids[start : start + size] for start in range(0, len(ids), size))
