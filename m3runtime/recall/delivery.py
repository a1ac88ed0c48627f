"""`Delivery`: leases the parts that a recall chose, loads what nobody loads, and waits for the rest."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from m3runtime.errors import StoreFullError
from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import Meter, Stages
from m3runtime.recall.background import Background
from m3runtime.recall.loader import Loader
from m3runtime.recall.store import Lease


@dataclass(slots=True)
class Delivered:
    """The result of `Delivery.gather`."""

    leases: dict[int, Lease] = field(default_factory=dict)
    """By id, of parts that are ready: the caller's to release."""
    late: list[int] = field(default_factory=list)
    """Ids that were not ready by the deadline, or that the store has no room for."""
    pending: list[Lease] = field(default_factory=list)
    """Leases of late parts that are still loading: the caller's to release."""
    hits: set[int] = field(default_factory=set)
    """Ids of parts that were in the store already: neither read nor decoded."""


class Delivery:
    """Delivers parts of one bank to recalls. Thread-safe; holds no lock while anything is read or decoded."""

    def __init__(self, loader: Loader, background: Background, meter: Meter) -> None:
        self._loader = loader
        self._store = loader.store
        self._background = background
        self._meter = meter

    def gather(
        self,
        ids: Iterable[int],
        dtype: torch.dtype,
        stages: Stages,
        *,
        deadline: float | None = None,
        blocks: Mapping[int, Tensor] | None = None,
    ) -> Delivered:
        """Lease the part of each id that is remembered and sound, loading what is missing.

        Without a ``deadline`` (a time of `time.perf_counter`) the calling thread loads whatever nobody else is loading,
        and waits for the others. With one it loads what the fastest tier has; blocks below it are loaded in the
        background and waited for until the deadline. ``blocks`` gives encoded blocks by id that the home has not.

        Raises the error of a load that this call began, and `StoreFullError` if, without a deadline, leased parts fill
        the store.
        """
        result = Delivered()
        missing = list(dict.fromkeys(ids))
        while missing:
            leases, beyond = self._store.lease(missing, dtype)
            mine = set(leases)
            try:
                if beyond and deadline is None:
                    raise StoreFullError(
                        f"recall.decoded: no room for {len(beyond)} memories, for streams read others that fill its "
                        f"{self._store.capacity} bytes; set a larger size, or recall fewer memories at once"
                    )
                result.hits |= {lease.id for lease in leases if lease.entry.state == "ready"}
                begun = self._begin(leases, stages, deadline, blocks)
                self._wait(leases, stages, deadline)
                missing = []
                for lease in leases:
                    entry = lease.entry
                    if entry.state == "ready":
                        self._loader.side.arrive(lease.loaded.ready, lease.loaded.part)
                        result.leases[lease.id] = lease
                        mine.discard(lease)
                    elif not entry.done.done():
                        result.late.append(lease.id)
                        result.pending.append(lease)
                        mine.discard(lease)
                    elif (error := entry.done.exception()) is not None:
                        if lease.id in begun:
                            raise error
                        missing.append(lease.id)  # the call that loaded it failed: try it in this one
                result.late += beyond
            except BaseException:
                self._store.release([*result.leases.values(), *result.pending])
                raise
            finally:
                self._store.release(mine)
        return result

    def _begin(
        self, leases: Sequence[Lease], stages: Stages, deadline: float | None, blocks: Mapping[int, Tensor] | None
    ) -> set[int]:
        """Load what nobody loads yet, here or in the background. Returns the ids of what this call began."""
        wanted = [lease for lease in leases if lease.entry.state == "wanted"]
        if not wanted:
            return set()
        below: list[Lease] = []
        if deadline is not None:
            is_near = self._loader.hierarchy.near(as_ids([lease.id for lease in wanted]))
            below = [lease for lease, near in zip(wanted, is_near, strict=True) if not near]
        if below:
            self._background.submit(partial(self._load_below, below, stages.streams), urgent=True)
        near_ones = [lease for lease in wanted if lease not in below]
        self._loader.load(near_ones, stages, aside=False, blocks=blocks)
        return {lease.id for lease in wanted}

    def _load_below(self, leases: Sequence[Lease], streams: tuple[int, ...]) -> None:
        stages = self._meter.lookahead(streams)
        try:
            self._loader.load(leases, stages, aside=True)
        finally:
            stages.count()

    @staticmethod
    def _wait(leases: Sequence[Lease], stages: Stages, deadline: float | None) -> None:
        loading = [lease.entry.done for lease in leases if lease.entry.state in ("wanted", "loading")]
        if loading:
            with stages.stage("wait", len(loading)):
                wait(loading, None if deadline is None else max(0.0, deadline - time.perf_counter()))
