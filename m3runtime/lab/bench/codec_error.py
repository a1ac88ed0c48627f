"""`errors`: squared error of codecs at equal bytes, against faiss' quantisers on the same vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.kmeans import by_blas
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

Floats = npt.NDArray[np.float32]


def _pq(dim: int, size: int) -> Any:
    index: Any = faiss.IndexPQ(dim, size, 8)
    index.do_polysemous_training = False  # codes are not sorted, which takes seconds a head and changes no error
    return index


# Not by `faiss.index_factory`, which crashes in a process that has imported usearch before faiss.
FAISS: Mapping[str, Callable[[int, int], Any]] = {
    "PQ{bytes}x8np": _pq,
    "OPQ{bytes}_{dim},PQ{bytes}x8np": lambda dim, size: faiss.IndexPreTransform(
        faiss.OPQMatrix(dim, size, dim), _pq(dim, size)
    ),
    "RQ{bytes}x8": lambda dim, size: faiss.IndexResidualQuantizer(dim, size, 8),
}
"""Makers of faiss indexes by dimensions and bytes of a vector: product quantiser, rotated product, residual."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Options of the product codec by mean bytes of a vector, over keys and values."""

    name: str
    options: Callable[[int], dict[str, Any]]


OURS = (
    Ours("each vector, pca", lambda size: {"key_bytes": size, "value_bytes": size, "offset": False}),
    Ours("transform of each head", lambda size: {"bytes": 2 * size, "together": "head"}),
    Ours("transform of a layer", lambda size: {"bytes": 2 * size}),
)


@dataclass(frozen=True, slots=True)
class Error:
    """Squared error of held-out vectors over their squared distance to the mean, averaged over heads."""

    codec: str
    bytes: float
    """Mean bytes of a vector, over keys and values."""
    keys: float
    values: float

    @property
    def both(self) -> float:
        """The mean of keys and values."""
        return (self.keys + self.values) / 2


def errors(
    sample: MemoryTensors, held_out: MemoryTensors, spec: MemorySpec, threads: int, progress: Callable[[int, int], None]
) -> dict[int, list[Error]]:
    """Errors at an eighth, a quarter and a half of a byte per channel, of faiss' quantisers and of ours.

    ``sample`` and ``held_out`` are memories of ``spec`` on the CPU. faiss' quantisers are trained for each layer and KV
    head alone.
    """
    sizes = [spec.head_dim // 8, spec.head_dim // 4, spec.head_dim // 2]
    steps, done = len(sizes) * (len(FAISS) + len(OURS)), 0
    found: dict[int, list[Error]] = {}
    for size in sizes:
        found[size] = []
        for factory, make in FAISS.items():
            progress(done, steps)
            name = factory.format(bytes=size, dim=spec.head_dim)
            found[size].append(_of_faiss(name, make, size, sample, held_out, threads))
            done += 1
        for ours in OURS:
            progress(done, steps)
            codec = ProductCodec(spec, **ours.options(size))
            codec.fit(sample)
            decoded = codec.decode(codec.encode(held_out), held_out.tokens, torch.float32)
            by_head = [_compare(*rows) for rows in zip(_heads(sample), _heads(held_out), _heads(decoded), strict=True)]
            bytes_taken = codec.payload_bytes(1) / spec.vectors_per_token / 2
            found[size].append(_error(f"product, {ours.name}", bytes_taken, by_head))
            done += 1
    progress(steps, steps)
    return found


def _of_faiss(
    name: str, make: Callable[[int, int], Any], size: int, sample: MemoryTensors, held_out: MemoryTensors, threads: int
) -> Error:
    faiss.omp_set_num_threads(threads)
    by_head = []
    for train, test in zip(_heads(sample), _heads(held_out), strict=True):
        index = make(train.shape[1], size)
        kept = _quiet(index, train.shape[1], size)
        with by_blas():  # or its k-means takes minutes
            index.train(train)
        del kept
        by_head.append(_compare(train, test, index.sa_decode(index.sa_encode(test))))
    return _error(f"faiss {name}", size, by_head)


def _quiet(index: Any, dim: int, parts: int) -> Any:
    """Silence the warning about few vectors: a head has no more. Keep the result until the training ends."""
    inner = faiss.ProductQuantizer(dim, parts, 8)
    inner.cp.min_points_per_centroid = 1
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a vector of C++, whatever its type says
        rotation: Any = faiss.downcast_VectorTransform(chain.at(0))
        rotation.pq = inner
        index = faiss.downcast_index(index.index)
    quantiser = index.rq if isinstance(index, faiss.IndexResidualQuantizer) else index.pq
    quantiser.cp.min_points_per_centroid = 1
    return inner


def _heads(memories: MemoryTensors) -> Sequence[Floats]:
    """The vectors of all memories, one array per layer and head; keys first, then values."""
    found: list[Floats] = []
    for x in (memories.keys, memories.values):
        rows = [x[i, :, :, :own].flatten(0, 1) for i, own in enumerate(memories.tokens.tolist())]
        found.extend(np.ascontiguousarray(head.numpy()) for head in torch.cat(rows, 1).float())
    return found


def _compare(train: Floats, true: Floats, back: Floats) -> float:
    return float(np.square(true - back).sum() / np.square(true - train.mean(0)).sum())


def _error(name: str, size: float, by_head: Sequence[float]) -> Error:
    half = len(by_head) // 2
    return Error(name, size, float(np.mean(by_head[:half])), float(np.mean(by_head[half:])))
