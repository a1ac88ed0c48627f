"""Calibration: bias directions of a model, fitted over all positions that will be served, and measured elsewhere.

The model reads two long texts as a stream would: after the sink, with memories that change. The directions are fitted
to the queries of the first, and measured on those of the second. RoPE rotates queries at far positions otherwise than
near ones: directions that are fitted to a few hundred positions fail beyond them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3model.attention.layout import Pair
from m3model.bias.fitting import SIZES, Logits, Moments, Spread
from m3model.bias.queries import Asked, capped, watched
from m3model.engine.session import Session
from m3runtime.errors import InputError
from m3runtime.memory.tensors import MemoryTensors

BUCKETS = 8
"""Stretches of positions of equal length, each measured by itself."""
NULL_SLOTS = 1024
"""Null slots that a memory region may have."""
_PIECE = 256
"""Tokens of one forward pass, at most; the memories change with each."""
_MEMORIES = 5
"""Memories that are read at once, at most."""
_POOL = 16
"""Memories to choose from."""
_EVERY = 64
"""Of so many queries one is asked how it weighs what it sees, which costs as much as attention itself."""

Look = Callable[[Asked, int], None]
"""Called with what a layer is asked, and the bucket of positions."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Directions of all layers, and their measure on held-out queries."""

    directions: Tensor
    """``float32[layers, kv_heads, head_dim]``."""
    overall: Spread
    """Over all positions, ``[layers, kv_heads]``."""
    by_position: Spread
    """``[layers, kv_heads, BUCKETS]``."""
    shares: Tensor
    """The share of queries by the size of their logit, ``float64[layers, kv_heads, sizes]``; see `SIZES`."""
    totals: Tensor
    """The least logarithm of the sum of weights of any query that was asked for it, ``[layers, kv_heads]``."""
    taken: Tensor
    """The share of a rise that the model's cap of logits takes back, on average, ``[layers, kv_heads]``."""
    softcap: float | None

    def null_weight(self, level: float) -> Tensor:
        """The attention that `NULL_SLOTS` null slots of this level take, ``float64[layers, kv_heads]``.

        On average over queries, as if each had the smallest total of any.
        """
        logits = capped(-level * SIZES.double(), self.softcap)
        taken = (logits - self.totals.double()[..., None] + math.log(NULL_SLOTS)).sigmoid()
        return (self.shares * taken).sum(-1)

    @property
    def error(self) -> Tensor:
        """The error of a weight: how far a rise by ``b`` is from ``b``, as a share of ``b``, ``[layers, kv_heads]``."""
        return self.overall.error + self.taken


class Calibration:
    """One calibration of one model. One thread."""

    def __init__(
        self,
        layers: int,
        session: Callable[..., Session],
        encode: Callable[[Sequence[str]], MemoryTensors],
        ids: Callable[[Sequence[str], int], list[int]],
    ) -> None:
        """``layers`` is how many the model has, ``session`` and ``encode`` are the adapter's.

        ``ids`` makes so many tokens of texts, as they are served.
        """
        self._layers = layers
        self._session, self._encode, self._ids = session, encode, ids

    def run(self, texts: Sequence[str], length: int, progress: Callable[[int, int], None]) -> Measured:
        """Fit to every other text, and measure on the rest. ``progress`` gets the tokens read, and all of them.

        Raises `InputError` for fewer than two texts, or if the queries of a head have nothing in common.
        """
        if len(texts) < 2:
            raise InputError("bias directions need two references at least: some to fit to, others to measure on")
        moments = [Moments() for _ in range(self._layers)]
        self._read(
            texts[::2],
            length,
            lambda asked, _: moments[asked.layer].add(asked.grouped()),
            lambda done: progress(done, 2 * length),
        )
        directions = [one.direction() for one in moments]
        measure = _Measure(directions)
        self._read(texts[1::2], length, measure, lambda done: progress(length + done, 2 * length))
        return measure.result()

    def _read(self, texts: Sequence[str], length: int, look: Look, progress: Callable[[int], None]) -> None:
        """Let the model read texts as a stream would, and look at what its layers are asked."""
        ids, pool, draw = self._ids(texts, length), self._pool(texts), random.Random(0)
        session = self._session(1, context=length)
        piece = min(_PIECE, -(-length // BUCKETS))
        start = 0

        with watched(session.model, lambda asked: look(asked, start * BUCKETS // length)):
            for start in range(0, length, piece):
                session.read([draw.sample(pool, min(draw.randint(0, _MEMORIES), len(pool)))])
                session.feed(torch.tensor([ids[start : start + piece]]))
                progress(min(start + piece, length))

    def _pool(self, texts: Sequence[str]) -> list[Pair]:
        encoded = self._encode(texts[:_POOL])
        rows = zip(encoded.keys, encoded.values, encoded.tokens.tolist(), strict=True)
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values, count in rows]


class _Measure:
    """Measures directions on queries."""

    def __init__(self, directions: Sequence[Tensor]) -> None:
        self._directions = directions
        self._logits = [Logits(one, BUCKETS) for one in directions]
        heads = (len(directions), directions[0].shape[0])
        self._totals, self._taken = torch.full(heads, torch.inf), torch.zeros(heads)
        self._pieces = torch.zeros(len(directions), 1)
        self._softcap: float | None = None

    def __call__(self, asked: Asked, bucket: int) -> None:
        """Count in the queries of one layer and piece."""
        place = asked.layer
        self._logits[place].add(asked.grouped(), bucket)
        total, taken = asked.weighing(_EVERY)
        self._totals[place] = torch.minimum(self._totals[place], total.amin(1).cpu())
        self._taken[place] += taken.mean(1).cpu()
        self._pieces[place] += 1
        self._softcap = asked.scaling.softcap

    def result(self) -> Measured:
        """The measure of all that was counted in."""
        return Measured(
            torch.stack(list(self._directions)),
            Spread.stacked([one.spread() for one in self._logits]),
            Spread.stacked([one.spread(by_bucket=True) for one in self._logits]),
            torch.stack([one.shares for one in self._logits]),
            self._totals,
            self._taken / self._pieces,
            self._softcap,
        )
