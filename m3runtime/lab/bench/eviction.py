"""``m3 bench eviction``: eviction policies on a recorded trace, compared with the optimum.

One caching tier in front of all that is slower is replayed, as the hierarchy and the slab treat it.
Requests are the different ids of each read and each lift. Those that are held when the call comes are hits; the others
are brought up and admitted. Only a read counts as a use of what is held.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime.errors import InputError
from m3runtime.lab.bench.trace import Trace, read_trace
from m3runtime.lab.results import Result
from m3runtime.observe.figures import show_size
from m3runtime.storage.eviction import EvictionPolicy, make_policy
from m3runtime.storage.trace import Op

REQUESTS = ("read", "lift")
OPTIMUM = "optimum"
_NEVER = -1

Run = Sequence[Op]


@dataclass(frozen=True, slots=True)
class PolicyCounts:
    """The counts of one policy with one capacity."""

    policy: str
    slots: int
    """Capacity in blocks."""
    hits: int
    brought_up: int
    """Requested blocks that were not held."""

    @property
    def hit_rate(self) -> float:
        """Hits over requests, in [0, 1]."""
        return self.hits / (self.hits + self.brought_up)


@dataclass(frozen=True, slots=True)
class EvictionBench(Result):
    """The counts of all policies and capacities."""

    trace: str
    slot_bytes: int
    runs: int
    requests: int
    blocks: int
    """Distinct blocks requested in each run, added up: any cache misses each at least once."""
    rows: Sequence[PolicyCounts]
    """By capacity in the order given; for each the policies, then the optimum."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [
            {**asdict(row), "hit_rate": row.hit_rate, "bytes": row.brought_up * self.slot_bytes} for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            "capacity", "blocks", "policy", "hit rate", "lifted", "bytes", title="One tier before slower ones"
        )
        for row, following in zip(self.rows, [*self.rows[1:], None], strict=True):
            table.add_row(
                show_size(row.slots * self.slot_bytes),
                f"{row.slots:,}",
                row.policy,
                f"{row.hit_rate:.3f}",
                f"{row.brought_up:,}",
                show_size(row.brought_up * self.slot_bytes),
                end_section=following is None or following.slots != row.slots,
            )
        yield table
        yield f"{self.requests:,} requests of {self.blocks:,} blocks; runs: {self.runs}; {self.trace}"


def bench_eviction(path: Path, policies: Sequence[str], capacities: Sequence[int]) -> EvictionBench:
    """Replay a trace. ``capacities`` are in bytes; none: a quarter of the fastest tier's, itself, and four times it.

    Raises `InputError` for a trace that cannot be used and for a capacity without room for a block, and `ConfigError`
    for an unknown policy.
    """
    for name in policies:
        make_policy(name, 1)
    trace = read_trace(path)
    requested = [set().union(*(op.ids for op in run if op.op in REQUESTS)) for run in trace.runs]
    if not any(requested):
        raise InputError(f"the trace {path} holds no reads yet")
    rows = []
    for slots in _slots(trace, capacities, path):
        counts = {name: [replay(run, make_policy(name, slots)) for run in trace.runs] for name in policies}
        counts[OPTIMUM] = [optimum(run, slots) for run in trace.runs]
        for name, of_runs in counts.items():
            hits = sum(of_runs)
            rows.append(PolicyCounts(name, slots, hits, requests(trace.runs) - hits))
    blocks = sum(map(len, requested))
    return EvictionBench(str(path), trace.slot_bytes, len(trace.runs), requests(trace.runs), blocks, rows)


def requests(runs: Iterable[Run]) -> int:
    """The number of requests."""
    return sum(len(set(op.ids)) for run in runs for op in run if op.op in REQUESTS)


def replay(run: Run, policy: EvictionPolicy) -> int:
    """The number of hits in a tier of ``policy.slots`` blocks that starts empty."""
    cache, hits = _Cache(policy), 0
    for op in run:
        if op.op in REQUESTS:
            hits += cache.request(op.ids, lifting=op.op == "lift")
        elif op.op in cache.others:
            cache.others[op.op](op)
    return hits


def optimum(run: Run, slots: int) -> int:
    """The most hits that any policy can have: those of one that knows all later requests (Belady's MIN).

    After each call it keeps, of what was held and what was brought up, the blocks that are requested again soonest. It
    may keep nothing of what was brought up, which a policy may not.
    """
    nexts: list[dict[int, int]] = [{} for _ in run]  # for each call when its ids are requested again
    coming: dict[int, int] = {}
    for at in range(len(run) - 1, -1, -1):
        op = run[at]
        if op.op in REQUESTS:
            nexts[at] = {id: coming.get(id, _NEVER) for id in op.ids}
            coming.update(dict.fromkeys(op.ids, at))
        elif op.op == "discard":
            for id in op.ids:
                coming.pop(id, None)
    hits, kept, latest = 0, dict[int, int](), list[tuple[int, int]]()
    for again in nexts:
        hits += len(kept.keys() & again.keys())
        for id, when in again.items():
            if when == _NEVER:
                kept.pop(id, None)
            else:
                kept[id] = when
                heapq.heappush(latest, (-when, id))
        while len(kept) > slots:
            when, id = heapq.heappop(latest)
            if kept.get(id) == -when:
                del kept[id]
    return hits


class _Cache:
    """The ids that a tier would hold."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.held: set[int] = set()
        self.others: dict[str, Callable[[Op], None]] = {
            "score": self.score,
            "discard": self.discard,
        }

    def request(self, ids: Sequence[int], *, lifting: bool) -> int:
        """Request ids. Returns how many distinct ones were held."""
        found = self.held.intersection(ids)
        if not lifting:
            for id in filter(found.__contains__, ids):
                self.policy.touched(id)
        for id in sorted(set(ids)) if lifting else ids:
            if id not in found:
                self.admit(id)
        return len(found)

    def admit(self, id: int) -> None:
        if id in self.held:
            return
        if len(self.held) >= self.policy.slots:
            victim = self.policy.victim()
            if victim is None:
                return
            self.remove(victim)
        self.held.add(id)
        self.policy.admitted(id)

    def remove(self, id: int) -> None:
        self.held.remove(id)
        self.policy.removed(id)

    def score(self, op: Op) -> None:
        for id, score in zip(op.ids, op.scores or (), strict=True):
            if id in self.held:
                self.policy.scored(id, score)

    def discard(self, op: Op) -> None:
        for id in sorted(set(op.ids)):
            if id in self.held:
                self.remove(id)


def _slots(trace: Trace, capacities: Sequence[int], path: Path) -> list[int]:
    """The capacities in blocks, each once."""
    if not capacities:
        room = [(tier.capacity or 0) // trace.slot_bytes for tier in trace.tiers]
        fastest = next(filter(None, room), 0)
        if not fastest:
            raise InputError(f"the trace {path} is of no caching tier with room for a block; give --capacity")
        return list(dict.fromkeys((max(1, fastest // 4), fastest, 4 * fastest)))
    for capacity in capacities:
        if capacity < trace.slot_bytes:
            raise InputError(f"--capacity {capacity}B is too small: a block takes {trace.slot_bytes} bytes here")
    return list(dict.fromkeys(capacity // trace.slot_bytes for capacity in capacities))
