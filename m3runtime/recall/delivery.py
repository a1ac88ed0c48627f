"""`Delivery`: leases the parts that a recall chose, loads what nobody loads, and waits for the rest."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from m3runtime.errors import StoreFullError
from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import Meter, Phases
from m3runtime.recall.background import Background
from m3runtime.recall.lease import Lease
from m3runtime.recall.loader import Loader


@dataclass(eq=False, slots=True)
class Delivered:
    """The result of `Delivery.gather`."""

    leases: dict[int, Lease] = field(default_factory=dict)
    """By id, of parts that are ready: the caller's to release."""
    late: set[int] = field(default_factory=set)
    """Ids that were not ready by the deadline, or that the store has no room for."""
    pending: dict[int, Lease] = field(default_factory=dict)
    """By id, of late parts that are still loading: the caller's to release."""
    hits: set[int] = field(default_factory=set)
    """Ids of parts that were in the store already: neither read nor decoded."""
    loader: object = field(default_factory=object)
    """The `Entry.loader` of what the call loads."""


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
        phases: Phases,
        *,
        deadline: float | None = None,
        encoded: Mapping[int, Tensor | None] | None = None,
    ) -> Delivered:
        """Lease the part of each id that is remembered and sound, loading what is missing.

        Without a ``deadline`` (a time of `time.perf_counter`) the calling thread loads whatever nobody else is loading,
        and waits for the others. With one it loads what the fastest tier has; blocks below it are loaded in the
        background and waited for until the deadline. ``encoded`` has the ids that were encoded just now, which are
        loaded at once, and the block of each that the home has no room for.

        Raises the error of a load that this call began, and `StoreFullError` if, without a deadline, leased parts fill
        the store.
        """
        result = Delivered()
        missing = list(dict.fromkeys(ids))
        try:
            while missing:
                missing = self._gather_once(missing, dtype, phases, deadline, encoded or {}, result)
        except BaseException:
            self._store.release([*result.leases.values(), *result.pending.values()])
            raise
        return result

    def _gather_once(
        self,
        ids: Sequence[int],
        dtype: torch.dtype,
        phases: Phases,
        deadline: float | None,
        encoded: Mapping[int, Tensor | None],
        result: Delivered,
    ) -> list[int]:
        """Add these ids to the result. Returns those that must be tried again."""
        leases, beyond, blocked_by = self._store.lease(ids, dtype)
        try:
            if beyond and deadline is None:
                self._store.release(leases)
                self._wait_for_room(len(beyond), blocked_by, phases)
                return list(ids)
            result.late.update(beyond)
            result.hits.update(lease.id for lease in leases if lease.entry.state == "ready")
            self._load(leases, result.loader, phases, deadline, encoded)
            self._wait(leases, phases, deadline)
            return [lease.id for lease in leases if not self._hand_over(lease, result)]
        finally:
            kept = result.leases.keys() | result.pending.keys()
            self._store.release([lease for lease in leases if lease.id not in kept])

    def _load(
        self,
        leases: Sequence[Lease],
        by: object,
        phases: Phases,
        deadline: float | None,
        encoded: Mapping[int, Tensor | None],
    ) -> None:
        """Load what nobody loads yet, here or in the background."""
        wanted = [lease for lease in leases if lease.entry.state == "wanted"]
        if not wanted:
            return
        near, below = wanted, list[Lease]()
        if deadline is not None:
            in_tier = self._loader.hierarchy.near(as_ids([lease.id for lease in wanted])).tolist()
            is_near = [held or lease.id in encoded for lease, held in zip(wanted, in_tier, strict=True)]
            near = [lease for lease, here in zip(wanted, is_near, strict=True) if here]
            below = [lease for lease, here in zip(wanted, is_near, strict=True) if not here]
        if below:
            self._background.submit(partial(self._load_below, below, by, phases.streams), urgent=True)
        blocks = {id: block for id, block in encoded.items() if block is not None}
        self._loader.load(near, by, phases, aside=False, blocks=blocks)

    def _load_below(self, leases: Sequence[Lease], by: object, streams: tuple[int, ...]) -> None:
        phases = self._meter.lookahead(streams)
        try:
            self._loader.load(leases, by, phases, aside=True)
        finally:
            phases.count()

    def _hand_over(self, lease: Lease, result: Delivered) -> bool:
        """Put the lease where it belongs in the result. False if another call failed to load it: this one may try."""
        entry = lease.entry
        is_done = entry.done.done()  # before the state, since it may become ready at any time
        if entry.state == "ready":
            self._loader.side.arrive(lease.loaded.ready, lease.loaded.part)
            result.leases[lease.id] = lease
        elif not is_done:
            result.late.add(lease.id)
            result.pending[lease.id] = lease
        elif (error := entry.done.exception()) is not None:
            if entry.loader is result.loader:
                raise error
            return False
        return True

    def _wait_for_room(self, count: int, guesses: Sequence[Future[None]], phases: Phases) -> None:
        """Wait until a prefetch has ended, which a recall may evict then. Raises `StoreFullError` if there is none."""
        if not guesses:
            raise StoreFullError(
                f"recall.decoded: no room for {count} memories, for streams read others that fill its "
                f"{self._store.capacity} bytes; set a larger size, or recall fewer memories at once"
            )
        with phases.phase("wait", len(guesses)):
            wait(guesses, return_when=FIRST_COMPLETED)

    @staticmethod
    def _wait(leases: Sequence[Lease], phases: Phases, deadline: float | None) -> None:
        loading = [lease.entry.done for lease in leases if lease.entry.state in ("wanted", "loading")]
        if loading:
            with phases.phase("wait", len(loading)):
                wait(loading, None if deadline is None else max(0.0, deadline - time.perf_counter()))
