"""`work`: the work of writing a bank by several processes, and its time where their speed is known."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes that encode."""

    count: int = 1
    rate: float | None = None
    """References that one of them writes in a second, measured by `m3 bench write`."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of writing a whole bank."""

    workers: int
    flop: int
    """FLOP of all workers."""
    flop_of_each: float
    seconds: float | None
    """None if their rate is not known. The one process that commits is taken to keep up with them."""


def work(workers: Workers, references: int, flop: int) -> Work:
    """The work of writing so many references, which take ``flop``."""
    seconds = None if workers.rate is None else references / (workers.rate * workers.count)
    return Work(workers.count, flop, flop / workers.count, seconds)
