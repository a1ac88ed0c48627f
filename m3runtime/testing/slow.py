"""`SlowTier` and `SlowHome`: a tier behind a slow drive or a network."""

import time
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from m3runtime.memory.block import Found, Ids
from m3runtime.storage.home import Batch, Changes, Home
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.wrapping import InnerT, Wrapped, WrappedHome, WrappedTier

T = TypeVar("T")


class _Slow(Wrapped[InnerT]):
    """Sleeps before or after the inner call and never inside: no lock of the inner tier is held meanwhile.

    ``latency`` is the seconds that every call but `close` takes more. ``bandwidth`` is bytes of slots a second
    for each call by itself (two at once do not share it), None for no bound. ``sleep`` is given the seconds.
    """

    def __init__(
        self,
        inner: InnerT,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self.latency = latency
        self.bandwidth = bandwidth
        self.sleep = sleep

    def around(self, method: str, work: Callable[[], T]) -> T:
        if method != "close":
            self.sleep(self.latency)
        return super().around(method, work)

    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        self.transfer(int(found.sum()))
        return found

    def write(self, ids: Ids, blocks: Tensor) -> None:
        self.transfer(len(ids))
        super().write(ids, blocks)

    def transfer(self, blocks: int) -> None:
        """Sleep as long as so many blocks take."""
        if self.bandwidth is not None:
            self.sleep(blocks * self.slot_bytes / self.bandwidth)


class SlowTier(_Slow[CachingTier], WrappedTier):
    """A caching tier that takes its time: ``SlowTier(tier, latency=0.005, bandwidth=2e9)``."""


class SlowHome(_Slow[Home], WrappedHome):
    """A home that takes its time, as on a drive that turns or beyond a network."""

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        self.transfer(len(batch.ids))
        super().commit(batch, replacing=replacing, changes=changes)

    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        self.transfer(len(ids))
        return super().fill(ids, blocks)
