"""Counts of recalls, hints, the store and tiers.

A field made by `counter` or `gauge` is also a metric of Prometheus: its name follows from the field's, and its
description is given here.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

C = TypeVar("C", "RecallCounts", "LookaheadCounts", "StoreCounts", "TierStats")


def counter(text: str) -> Any:
    """A field for a number that only grows, from 0."""
    return field(default=0, metadata={"type": "counter", "text": text})


def gauge(text: str) -> Any:
    """A field for a number that grows and shrinks."""
    return field(default=0, metadata={"type": "gauge", "text": text})


def exported(counts: Any) -> Iterator[Field[Any]]:
    """The fields of counts that are metrics."""
    return (one for one in fields(counts) if "type" in one.metadata)


def increased(counts: C, **more: float) -> C:
    """The counts with some increased, by name."""
    return replace(counts, **{name: getattr(counts, name) + by for name, by in more.items()})


@dataclass(frozen=True, slots=True)
class RecallCounts:
    """Counts of recalls."""

    chunks: int = counter("Chunks that were recalled for.")
    memories: int = counter("Memories given to chunks.")
    kept: int = counter("Memories given to chunks that the store held decoded already.")
    late: int = counter("Memories that had not arrived by the deadline, once for each chunk that went on without.")
    waited_s: float = counter("Seconds that recalls waited for blocks that other threads were loading.")
    encoded: int = counter("Cold references that were encoded at a recall.")
    unstored: int = counter("Memories encoded at a recall that the home had no room for.")
    encode_s: float = counter("Seconds spent on encoding cold references.")


@dataclass(frozen=True, slots=True)
class LookaheadCounts:
    """Counts of hints and of the background work that they started."""

    hints: int = counter("Hints of streams.")
    cancelled: int = counter("Hints that a newer one or the recall overtook before their memories were prefetched.")
    guesses: int = counter("Memories that hints asked for and that their stream did not lease.")
    hits: int = counter("Guesses that the next recall of their stream chose.")
    beyond: int = counter("Guesses without room in the store, which were only lifted.")
    failed: int = counter("Background work that failed.")
    last_error: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of the guesses that were chosen; 0 if there were none."""
        return self.hits / self.guesses if self.guesses else 0.0


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """The decoded memories of a device (`m3runtime.recall.memory_store.MemoryStore`)."""

    capacity: int = gauge("Most bytes of parts.")
    bytes: int = gauge("Bytes of parts, loading ones included.")
    parts: int = gauge("Parts that are ready.")
    leased: int = gauge("Parts that recalls lease.")
    guessed: int = gauge("Parts that prefetches lease.")
    decoded: int = counter("Memories decoded.")
    hits: int = counter("Leases of parts that were ready.")
    evicted: int = counter("Parts that made room for others.")
    wasted_bytes: int = counter("Bytes of parts that were decoded and removed before any recall leased them.")


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts of one tier in a hierarchy.

    `Hierarchy.read` requests every block from the first tier, and from each other tier the ``misses`` and the
    ``unanswered`` of the tier before. So ``hits + misses + unanswered`` are the requests to a tier, and ``bytes`` is
    the size of ``hits`` slots. Bad blocks count as misses too, unless `Hierarchy.lift` found them.
    """

    name: str
    hits: int = counter("Blocks that were read from the tier.")
    misses: int = counter("Blocks that were requested and that the tier did not have.")
    bytes: int = counter("Bytes of the slots that were read.")
    lifted: int = counter("Blocks that were lifted from the tier.")
    faults: int = counter("Calls that failed.")
    bad_blocks: int = counter("Blocks that failed their check (in the home twice in a row), and were quarantined.")
    recovered: int = counter("Blocks of the home that failed their check, and passed it when they were read again.")
    unanswered: int = counter("Blocks requested while the tier failed, or had yet to discard forgotten blocks.")
