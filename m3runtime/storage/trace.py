"""Traces: the calls to a hierarchy, recorded as they are made, to be replayed on other tiers or policies.

A trace is a file of JSON lines. The first is its header::

    {"m3_trace": 1, "slot_bytes": 553024, "tiers": [{"name": "pinned", "capacity": 1073419584}]}

``m3_trace`` is the version of the format. ``tiers`` are the caching tiers, fastest first, with their capacity in bytes.
The same line again begins another *run*, that of another process, whose tiers start empty. Each other line is a call,
in the order of the calls::

    {"op": "read", "ids": [17, 4]}
    {"op": "score", "ids": [17, 4], "scores": [0.71, 0.55]}

=======  ====================================================================================
op       meaning
=======  ====================================================================================
read     these blocks were wanted for decoding
lift     these blocks were prefetched into a faster tier
score    retrieval chose these ids with these ``scores``, one for each id
discard  these ids were forgotten
=======  ====================================================================================

Older traces also have the ops pin and unpin, which are ignored. A trace of one tier
(`m3runtime.testing.recording`) also has the ops write and contains; ``found`` is what a call answered, one truth for
each id, and ``error`` the name of the exception that it raised.

Each line is in the file before the call is made, so a process that was killed leaves a trace of all its calls. A torn
last line is ignored; any other malformed line is an error.
"""

import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal

from pydantic import ConfigDict, Field

from m3runtime.errors import InputError
from m3runtime.memory.block import Ids
from m3runtime.storage.tier import CachingTier, Scores

FORMAT = 1

log = logging.getLogger("m3runtime")

_Id = Annotated[int, Field(ge=0, lt=2**64)]
_Size = Annotated[int, Field(ge=0)]
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Op:
    """One call; see the module."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    op: Literal["read", "lift", "score", "discard", "write", "contains", "pin", "unpin"]
    ids: tuple[_Id, ...]
    scores: tuple[float, ...] | None = None
    found: tuple[bool, ...] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.scores is None) != (self.op != "score"):
            raise ValueError("scores belong to the op score, and to no other")
        if any(part is not None and len(part) != len(self.ids) for part in (self.scores, self.found)):
            raise ValueError("scores and found need one value for each id")

    def to_line(self) -> bytes:
        """The op as a line of a file."""
        return _line({key: value for key, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, slots=True)
class TracedTier:
    """A caching tier of the recorded hierarchy."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    name: str
    capacity: _Size | None
    """Capacity in bytes; None without a bound."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first line of a trace."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    m3_trace: int
    slot_bytes: Annotated[int, Field(ge=1)]
    tiers: tuple[TracedTier, ...]


class TraceWriter:
    """Records into a file: `record` is a `m3runtime.storage.hierarchy.Record`. Thread-safe, for one process at a time.

    An existing trace of equal tiers and slots gets another run. Raises `InputError` if the file cannot be
    written, or holds anything else. If it cannot be written later on, recording ends with a warning in the log, and
    nobody is held up.
    """

    def __init__(self, path: Path, slot_bytes: int, tiers: Sequence[CachingTier]) -> None:
        self.path = path
        header = Header(FORMAT, slot_bytes, tuple(TracedTier(tier.name, tier.capacity) for tier in tiers))
        self._lock = threading.Lock()
        self._ahead = _line(asdict(header))  # written with the first call: a run without any leaves no trace
        try:
            self._file = path.open("a+b", buffering=0)
            try:
                _continue(self._file, self._ahead, path)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise InputError(f"cannot record into {path}: {error.strerror or 'it is not a regular file'}") from error

    def record(self, op: str, ids: Ids, scores: Scores | None = None) -> None:
        """Add a call; see `m3runtime.storage.hierarchy.Record`."""
        self.write(Op(op, tuple(ids.tolist()), None if scores is None else tuple(scores.tolist())))  # type: ignore[arg-type]

    def write(self, op: Op) -> None:
        """Add a call. Ignored after `close`."""
        line = op.to_line()
        with self._lock:
            if self._file.closed:
                return
            line = self._ahead + line
            try:
                if self._file.write(line) < len(line):
                    raise OSError("no space left on the drive")
            except OSError as error:
                log.warning("recording into %s ended: %s", self.path, error)
                self._file.close()
            self._ahead = b""

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        with self._lock:
            self._file.close()


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _continue(file: BinaryIO, header: bytes, path: Path) -> None:
    """Cut off a torn last line. Raises `InputError` unless ``file`` is empty or begins with this header."""
    file.seek(0)
    first = file.read(len(header))
    if first != header and not (len(first) < len(header) and header.startswith(first)):
        raise InputError(f"{path} holds something else than a trace of these tiers; name another file to record into")
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65_536)
        file.seek(start)
        if (newline := file.read(end - start).rfind(b"\n")) >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
