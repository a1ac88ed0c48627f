"""`RecordingTier`: keeps a trace of what a tier was asked for and what it answered, which replays on another."""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from m3runtime.errors import InputError, M3Error
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.tier import CachingTier, Scores
from m3runtime.storage.trace import Op
from m3runtime.testing.blocks import make_blocks
from m3runtime.testing.wrapping import WrappedTier

T = TypeVar("T", bound=Found | None)


class RecordingTier(WrappedTier):
    """A caching tier around another: gives each call on ids to ``record``, with what was found or raised.

    ``record`` is the ``append`` of a list, or the ``write`` of a `TraceWriter`. Calls go one after the
    other, so that the trace has them in the order in which they took effect.
    """

    def __init__(self, inner: CachingTier, record: Callable[[Op], object]) -> None:
        super().__init__(inner)
        self._record = record
        self._one_by_one = threading.Lock()

    def read(self, ids: Ids, out: Tensor) -> Found:
        return self._recorded("read", ids, lambda: self.inner.read(ids, out))

    def write(self, ids: Ids, blocks: Tensor) -> None:
        self._recorded("write", ids, lambda: self.inner.write(ids, blocks))

    def discard(self, ids: Ids) -> None:
        self._recorded("discard", ids, lambda: self.inner.discard(ids))

    def contains(self, ids: Ids) -> Found:
        return self._recorded("contains", ids, lambda: self.inner.contains(ids))

    def score(self, ids: Ids, scores: Scores) -> None:
        self._recorded("score", ids, lambda: self.inner.score(ids, scores), scores)

    def _recorded(self, op: str, ids: Ids, call: Callable[[], T], scores: Scores | None = None) -> T:
        asked = tuple(ids.tolist())
        given = None if scores is None else tuple(scores.tolist())
        with self._one_by_one:
            try:
                answer = call()
            except M3Error as error:
                self._record(Op(op, asked, given, error=type(error).__name__))  # type: ignore[arg-type]
                raise
            found = tuple(answer.tolist()) if isinstance(answer, np.ndarray) else None
            self._record(Op(op, asked, given, found))  # type: ignore[arg-type]
            return answer


def replay(ops: Iterable[Op], tier: CachingTier) -> list[Op]:
    """Make the calls of a `RecordingTier` again, with the blocks of `make_blocks`. Returns what it records now.

    Equal tiers in equal states give equal lists. What a call raised is in the list, and the next call follows. Raises
    `InputError` for an op that only a hierarchy has.
    """
    replayed: list[Op] = []
    recording = RecordingTier(tier, replayed.append)
    for op in ops:
        if op.op == "lift":
            raise InputError("this is the trace of a hierarchy: tiers are not asked to lift")
        with suppress(M3Error):
            _call(recording, op)
    return replayed


def _call(tier: RecordingTier, op: Op) -> None:
    ids = np.array(op.ids, np.uint64)
    if op.op == "read":
        tier.read(ids, torch.empty((len(ids), tier.slot_bytes), dtype=torch.uint8))
    elif op.op == "write":
        tier.write(ids, make_blocks(ids, tier.slot_bytes))
    elif op.op == "score":
        tier.score(ids, np.array(op.scores, np.float32))
    else:
        getattr(tier, op.op)(ids)
