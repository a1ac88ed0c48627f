"""Training of a codec: the sample, the cost of errors, and the memories, within a bounded amount of RAM."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import numpy as np
import torch

from m3runtime.adapters.base import Adapter
from m3runtime.codecs import Codec
from m3runtime.codecs.steps import Steps
from m3runtime.documents.reference import Reference
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

TRAINING = "training"
"""The folder in a bank that keeps the steps of a training."""
WEIGHED = 48
"""References on which the cost of errors is measured. That takes about three times as long as encoding them."""

OnStep = Callable[[int, int], None]
"""Called with the steps done, and the number of all steps."""


def memory_tokens(references: Iterable[Reference], spec: MemorySpec) -> int:
    """The tokens that the memories of these references have."""
    return sum(min(one.tokens, spec.tokens) for one in references)


def sample(references: Iterable[Reference], tokens: int, spec: MemorySpec) -> list[Reference]:
    """A uniform sample of references whose memories have that many tokens, or all; equal texts are in it once.

    It depends on the set of texts alone, and so does its order: a text is drawn by its digest. So it is the same when
    some of them are known already, and a part of it is a uniform sample too.
    """
    drawn: list[tuple[int, int, Reference]] = []  # the greatest digest first
    digests = set[int]()
    total = 0
    for number, one in enumerate(references):
        digest = int.from_bytes(blake2b(one.text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
        if digest in digests or (total >= tokens and digest > -drawn[0][0]):
            continue
        heapq.heappush(drawn, (-digest, number, one))
        digests.add(digest)
        total += memory_tokens([one], spec)
        while total - (last := memory_tokens([drawn[0][2]], spec)) >= tokens:
            digests.remove(-heapq.heappop(drawn)[0])
            total -= last
    return [one for _, _, one in sorted(drawn, key=lambda item: -item[0])]


def fit_codec(
    codec: Codec, adapter: Adapter, texts: Sequence[str], batch_size: int, progress: OnStep | None = None
) -> None:
    """Train a codec on the memories of these references; a codec that learns nothing is left as it is.

    The memories are computed by the model. Errors are weighed by their cost if the codec weighs errors and the adapter
    can measure it.
    """
    if codec.trained:
        return
    report = _Report(progress, 3 * len(texts))
    importance = weigh(codec, adapter, texts, batch_size, Steps(), report.part(len(texts)))
    encoding = report.part(len(texts))

    def batches() -> Iterable[MemoryTensors]:
        for start in range(0, len(texts), batch_size):
            encoding(start / len(texts))
            yield adapter.encode(texts[start : start + batch_size])

    memories = collected(batches(), len(texts), adapter.spec)
    codec.fit(memories, importance, report.part(len(texts)))


def weigh(
    codec: Codec,
    adapter: Adapter,
    texts: Sequence[str],
    batch_size: int,
    steps: Steps,
    progress: Callable[[float], None],
) -> torch.Tensor | None:
    """The importance that `Codec.fit` takes, of some of these references; None if nobody measures it, or uses it."""
    weighed = texts[:: max(1, len(texts) // WEIGHED)][:WEIGHED] if codec.weighs_errors else []
    found: list[torch.Tensor] = []
    for start in range(0, len(weighed), batch_size):
        progress(start / len(weighed))

        def work(some: Sequence[str] = weighed[start : start + batch_size]) -> dict[str, torch.Tensor]:
            cost = adapter.importance(some)
            return {} if cost is None else {"cost": cost}

        found += steps.take(f"importance-{start}", work).values()
    progress(1.0)
    return torch.stack(found).mean(0) if found else None


def collected(parts: Iterable[MemoryTensors], count: int, spec: MemorySpec, width: int | None = None) -> MemoryTensors:
    """Batches of ``count`` memories in all as one, on the CPU; none has more than ``width`` tokens.

    In float16, which holds what int8 decodes to, in half of the RAM. Greater values are clamped.
    """
    most = torch.finfo(torch.float16).max
    shape = (count, len(spec.layers), spec.kv_heads, width or spec.tokens, spec.head_dim)
    keys, values = (torch.from_numpy(np.zeros(shape, np.float16)) for _ in range(2))
    tokens = torch.zeros(count, dtype=torch.int64)
    at = 0
    for part in parts:
        for row, own in enumerate(part.tokens.tolist()):
            keys[at, :, :, :own] = part.keys[row, :, :, :own].clamp(-most, most)
            values[at, :, :, :own] = part.values[row, :, :, :own].clamp(-most, most)
            tokens[at] = own
            at += 1
    return MemoryTensors(keys[:at], values[:at], tokens[:at])


def join(parts: Sequence[MemoryTensors]) -> MemoryTensors:
    """Batches of memories as one, padded with zeros to the longest, on the CPU."""
    width = max(part.keys.shape[3] for part in parts)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor.cpu(), (0, 0, 0, width - tensor.shape[3]))

    return MemoryTensors(
        keys=torch.cat([padded(part.keys) for part in parts]),
        values=torch.cat([padded(part.values) for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
    )


class _Report:
    """Progress of several parts as one number of steps."""

    def __init__(self, progress: OnStep | None, total: int) -> None:
        self._progress, self._total, self._before = progress, total, 0

    def part(self, steps: int) -> Callable[[float], None]:
        """The progress of the next part, in shares."""
        before = self._before
        self._before += steps

        def report(share: float) -> None:
            if self._progress:
                self._progress(before + round(steps * share), self._total)

        return report
