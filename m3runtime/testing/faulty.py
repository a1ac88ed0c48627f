"""`FaultyTier` and `FaultyHome`: a tier that fails on a schedule, and counts what it did.

==============  ========================================================  =============================================
kind            what happens                                              in which methods
==============  ========================================================  =============================================
``error``       `TierError`, and nothing was done                         all but ``close``; that (done first) if named
``lost_reply``  `TierError`, and all was done                             all but ``close`` and `ADDING`
``no_space``    `TierError`, of a home `BankFullError`; nothing was done  ``write`` and `ADDING`
``short_read``  a row is found, only its first bytes are filled           ``read``
``stale``       a row is found, and holds what the last read put out      ``read``
``other_id``    a row is found, and holds another id's block              ``read``
``bit_flip``    one bit of a block is wrong                               ``read``; if named, as below
``torn_write``  the end of a block does not reach the inner tier          ``write``, ``commit``, ``fill``
==============  ========================================================  =============================================

A fault that damages bytes damages one block of the call. ::

    tier = FaultyTier(PinnedTier(...), Schedule(Fault("bit_flip", rate=0.01), Fault("error", at={3}), seed=7))
    ...
    tier.schedule.on = False
    assert tier.schedule.injected
"""

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from m3runtime.errors import BankFullError, InputError, M3Error, TierError
from m3runtime.memory.block import HEADER_BYTES, Found, Ids
from m3runtime.storage.home import Batch, Changes, Home
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.blocks import make_ids
from m3runtime.testing.wrapping import InnerT, Wrapped, WrappedHome, WrappedTier

T = TypeVar("T")
Kind = Literal["error", "lost_reply", "no_space", "short_read", "stale", "other_id", "bit_flip", "torn_write"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ADDING = frozenset({"commit", "catalogue", "fill"})
"""Calls that add to a home: one that raises must have written nothing."""
_DIGEST_AT = 48  # of a header: what precedes it stays, as a home may refuse a block of another id or length


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault, and which calls it strikes.

    A share ``rate`` of the calls of ``methods``, and the calls ``at``, counted from 1 since the schedule was given
    this fault. No methods are those of the table above. Raises `InputError` for an unknown kind.
    """

    kind: Kind
    rate: float = 0.0
    at: Collection[int] = ()
    methods: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"a fault is one of {', '.join(KINDS)}, not {self.kind!r}")

    def covers(self, method: str) -> bool:
        """May it strike calls of this method?"""
        if self.methods:
            return method in self.methods
        match self.kind:
            case "error":
                return method != "close"
            case "lost_reply":
                return method not in {"close", *ADDING}
            case "no_space" | "torn_write":
                return method in {"write", *ADDING}
            case _:
                return method == "read"


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault that took place. ``id`` is the block that it damaged, None where a call raised."""

    kind: Kind
    method: str
    id: int | None = None


class Schedule:
    """Decides which calls fail, the same ones for the same seed and calls, and notes what took place.

    ``on`` may be set at any time; calls while it is off do not count. Thread-safe.
    """

    def __init__(self, *faults: Fault, seed: int = 0) -> None:
        self.on = True
        self._lock = threading.Lock()
        self._random = Random(seed)
        self._injected: list[Injection] = []
        self.set(*faults)

    def set(self, *faults: Fault) -> None:
        """Have these faults instead of those it had; none make the tier whole."""
        with self._lock:
            self._faults = faults
            self._calls = [0] * len(faults)

    @property
    def injected(self) -> tuple[Injection, ...]:
        """All that took place. Damage counts only where the bytes of a block became others."""
        with self._lock:
            return tuple(self._injected)

    def strikes(self, method: str, *kinds: Kind) -> "tuple[Kind, Random] | None":
        """Which of these kinds strikes this call of ``method``, and a source of chance for its details."""
        with self._lock:
            struck: Kind | None = None
            for number, fault in enumerate(self._faults):
                if self.on and fault.kind in kinds and fault.covers(method):
                    self._calls[number] += 1
                    if self._calls[number] in fault.at or self._random.random() < fault.rate:
                        struck = struck or fault.kind
            return None if struck is None else (struck, Random(self._random.getrandbits(64)))

    def note(self, kind: Kind, method: str, id: int | None = None) -> None:
        """It took place."""
        with self._lock:
            self._injected.append(Injection(kind, method, id))


class _Faulty(Wrapped[InnerT]):
    full: type[M3Error] = TierError

    def __init__(self, inner: InnerT, schedule: Schedule | None = None) -> None:
        super().__init__(inner)
        self.schedule = schedule or Schedule()
        self._last: Tensor | None = None  # the row that the last read put out
        self._known: deque[int] = deque(maxlen=256)  # ids that were read or written lately

    def around(self, method: str, work: Callable[[], T]) -> T:
        strike = self.schedule.strikes(method, "error", "lost_reply", "no_space")
        if strike is None:
            return super().around(method, work)
        kind, _ = strike
        if kind == "lost_reply" or method == "close":
            super().around(method, work)
        self.schedule.note(kind, method)
        if kind == "no_space":
            raise self.full(f"tier {self.name}: no space left, by a fault of the test")
        raise TierError(f"tier {self.name}: {method} failed, by a fault of the test")

    def read(self, ids: Ids, out: Tensor) -> Found:
        strike = self.schedule.strikes("read", "short_read", "stale", "other_id", "bit_flip")
        before = out.clone() if strike is not None else out
        found = super().read(ids, out)
        rows: list[int] = found.nonzero()[0].tolist()
        if strike is not None and rows:
            kind, chance = strike
            row = chance.choice(rows)
            right = out[row].clone()
            self._spoil(kind, chance, int(ids[row]), out[row], before[row])
            if not torch.equal(out[row, : (end := _end(right))], right[:end]):
                self.schedule.note(kind, "read", int(ids[row]))
        if rows:
            self._last = out[rows[-1]].clone()
            self._known.extend(ids[found].tolist())
        return found

    def write(self, ids: Ids, blocks: Tensor) -> None:
        self._tear("write", ids, blocks, lambda torn: super(_Faulty, self).write(ids, torn))

    def _spoil(self, kind: Kind, chance: Random, id: int, row: Tensor, before: Tensor) -> None:
        """Make a row that was read wrong. ``before`` is what it held before the call."""
        end = _end(row)
        match kind:
            case "bit_flip":
                row[chance.randrange(end)] ^= 1 << chance.randrange(8)
            case "short_read":
                cut = chance.randrange(end)
                row[cut:] = before[cut:]
            case "stale":
                row.copy_(before if self._last is None else self._last)
            case _:
                others = make_ids(*sorted(set(self._known) - {id}))
                blocks = torch.empty((len(others), self.slot_bytes), dtype=torch.uint8, device=row.device)
                if len(held := self.inner.read(others, blocks).nonzero()[0]):
                    row.copy_(blocks[chance.choice(held.tolist())])

    def _tear(self, method: str, ids: Ids, blocks: Tensor, work: Callable[[Tensor], T]) -> T:
        """Write blocks, one of which a fault may have damaged."""
        self._known.extend(ids.tolist())
        strike = self.schedule.strikes(method, "torn_write", "bit_flip") if len(ids) else None
        if strike is None:
            return work(blocks)
        kind, chance = strike
        row, torn = chance.randrange(len(ids)), blocks.clone()
        place = chance.randrange(_DIGEST_AT, _end(blocks[row]))
        if kind == "bit_flip":
            torn[row, place] ^= 1 << chance.randrange(8)
        else:
            torn[row, place : _end(blocks[row])] = 0
        result = work(torn)
        if not torch.equal(torn, blocks):
            self.schedule.note(kind, method, int(ids[row]))
        return result


class FaultyTier(_Faulty[CachingTier], WrappedTier):
    """A caching tier that fails as its ``schedule`` says. It says that it can rot, since it can."""

    def __init__(self, inner: CachingTier, schedule: Schedule | None = None) -> None:
        super().__init__(inner, schedule)
        self.can_rot = True


class FaultyHome(_Faulty[Home], WrappedHome):
    """A home that fails as its ``schedule`` says."""

    full = BankFullError

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        def work(blocks: Tensor) -> None:
            super(FaultyHome, self).commit(replace(batch, blocks=blocks), replacing=replacing, changes=changes)

        self._tear("commit", batch.ids, batch.blocks, work)

    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        return self._tear("fill", ids, blocks, lambda torn: super(FaultyHome, self).fill(ids, torn))


def _end(row: Tensor) -> int:
    """Where the block in a slot ends, as its header says; within the slot whatever it says."""
    return min(len(row), HEADER_BYTES + int.from_bytes(bytes(row[32:36].tolist()), "little"))
