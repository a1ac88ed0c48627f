"""`read_trace`: the recorded calls of a hierarchy, checked line by line; see `m3runtime.storage.trace`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from m3runtime.errors import InputError
from m3runtime.plugins.messages import first_fault
from m3runtime.storage.trace import FORMAT, Header, Op, TracedTier

_GONE = ("pin", "unpin")
"""Ops of earlier releases, whose caching tiers had pins."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trace:
    """The content of a trace."""

    slot_bytes: int
    tiers: tuple[TracedTier, ...]
    """The caching tiers, fastest first."""
    runs: tuple[tuple[Op, ...], ...]
    """The calls of each process, one after the other."""


def read_trace(path: Path) -> Trace:
    """Read a whole trace. Raises `InputError` that names the file, the line and what is wrong with it."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"cannot read the trace {path}: {error.strerror}") from error
    if not lines:
        raise InputError(f"the trace {path} is empty; record one with `recall.trace` in the configuration")
    header = _parse(_HEADER, lines[0], f"{path} is no trace: line 1")
    if header.m3_trace != FORMAT:
        raise InputError(f"{path}: a trace of format {header.m3_trace}, this release reads {FORMAT}")
    runs: list[list[Op]] = [[]]
    for number, line in enumerate(lines[1:], 2):
        if line == lines[0]:
            runs.append([])
            continue
        try:
            op = _parse(_OP, line, f"{path}: line {number}")
            if op.op not in _GONE:
                runs[-1].append(op)
        except InputError:
            if number < len(lines) or line.endswith(b"\n"):
                raise  # else the writer was stopped here
    return Trace(header.slot_bytes, header.tiers, tuple(tuple(run) for run in runs))


_HEADER, _OP = TypeAdapter(Header), TypeAdapter(Op)


def _parse(kind: TypeAdapter[T], line: bytes, where: str) -> T:
    try:
        return kind.validate_json(line)
    except ValidationError as error:
        what = first_fault(error).replace(" at line 1 column", " at column")  # which is this line
        raise InputError(f"{where} {what}") from None
