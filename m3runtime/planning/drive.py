"""The rate at which a drive can deliver memories, if no faster tier holds any of them."""

from dataclasses import dataclass

PAGE = 4096
"""Smallest read of a drive, in bytes."""


@dataclass(frozen=True, slots=True)
class Drive:
    """The limits of a drive, as far as they are known."""

    bandwidth: int | None = None
    """Bytes per second."""
    iops: int | None = None
    """Reads per second, of any size."""
    speed: float | None = None
    """Tokens per second that one stream decodes, to compute how many streams the drive serves."""


@dataclass(frozen=True, slots=True)
class Reads:
    """The rates that a drive allows when every memory of every chunk is one read."""

    read_bytes: int
    """Bytes of one read: a block in whole pages."""
    limit: str
    """``bandwidth`` or ``iops``, whichever is exhausted first."""
    reads_per_s: float
    recalls_per_s: float
    """Recalls per second; each reads all memories of a chunk."""
    tokens_per_s: float
    """Decoded tokens per second of all streams together."""
    streams: float | None
    """Streams that decode at `Drive.speed`; None if no speed is known."""


def reads(drive: Drive, block: int, memories: int, chunk_tokens: int) -> Reads | None:
    """The reads that a drive allows, or None if no limit is known.

    ``block`` is in bytes; each chunk of ``chunk_tokens`` tokens reads ``memories`` blocks.
    """
    read_bytes = -(-block // PAGE) * PAGE
    rates: dict[str, float] = {}
    if drive.bandwidth is not None:
        rates["bandwidth"] = drive.bandwidth / read_bytes
    if drive.iops is not None:
        rates["iops"] = float(drive.iops)
    if not rates:
        return None
    limit = min(rates, key=rates.__getitem__)
    recalls = rates[limit] / memories
    tokens = recalls * chunk_tokens
    return Reads(
        read_bytes, limit, rates[limit], recalls, tokens, None if drive.speed is None else tokens / drive.speed
    )
