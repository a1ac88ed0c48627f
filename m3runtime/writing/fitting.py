"""Training of a codec on memories that an adapter computes from references."""

import heapq
import random
from collections.abc import Callable, Sequence

import torch

from m3runtime.adapters.base import Adapter
from m3runtime.codecs import Codec
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

SAMPLE = 96
"""References whose memories a codec is trained on; as many times more as memories have fewer tokens."""
WEIGHED = 48
"""References on which the cost of errors is measured. That takes about three times as long as encoding them."""

OnReference = Callable[[int, int], None]
"""Called with the steps done, and the number of all steps."""


def sample_size(spec: MemorySpec) -> int:
    """References that a codec of this spec is trained on."""
    return SAMPLE * spec.reference_tokens // spec.tokens


def sample(references: ReferenceSpool, spec: MemorySpec) -> list[str]:
    """The texts that a codec of this spec is trained on: a uniform sample in the order of the references.

    Deterministic: the places depend on the number of references alone.
    """
    draw = random.Random(0).random  # the one method whose numbers are the same in every release of Python
    places = heapq.nsmallest(sample_size(spec), range(len(references)), key=lambda _: draw())
    return [references[place].text for place in sorted(places)]


def fit_codec(
    codec: Codec, adapter: Adapter, texts: Sequence[str], batch_size: int, progress: OnReference | None = None
) -> None:
    """Train a codec on the memories of these references; a codec that learns nothing is left as it is.

    Errors are weighed by their cost if the codec weighs errors and the adapter can measure it. Takes about three times
    the bytes of these memories.
    """
    if codec.trained:
        return
    weighed = texts[:: max(1, len(texts) // WEIGHED)][:WEIGHED] if codec.weighs_errors else []
    steps = 2 * len(texts) + len(weighed)

    def report(done: float) -> None:
        if progress:
            progress(round(done), steps)

    memories: list[MemoryTensors] = []
    for start in range(0, len(texts), batch_size):
        report(start)
        memories.append(adapter.encode(texts[start : start + batch_size]))
    report(len(texts))
    found = []
    for start in range(0, len(weighed), batch_size):
        if (cost := adapter.importance(weighed[start : start + batch_size])) is not None:
            found.append(cost)
        report(len(texts) + min(start + batch_size, len(weighed)))
    importance = torch.stack(found).mean(0) if found else None
    before = len(texts) + len(weighed)
    codec.fit(join(memories), importance, lambda share: report(before + len(texts) * share))


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
