"""Quantisers that faiss trained become codecs, and codecs become indexes of faiss; codes are the same bytes in both.

========================================  =============================================
index of faiss                            levels of a codec of scope ``model``
========================================  =============================================
``PQ16x8``                                ``16x8``
``Residual2x14,PQ8x10``                   ``2x14+8x10``
``OPQ20_80,...`` before either of them    the same, rotated
========================================  =============================================
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.residual import BITS, Level, text_of
from m3runtime.codecs.product.residual_quantiser import ResidualQuantiser, Tables
from m3runtime.errors import CodecError, InputError, PluginError
from m3runtime.memory.spec import MemorySpec

try:
    import faiss
except ImportError as error:
    raise PluginError("exchanging quantisers with faiss needs faiss: pip install 'm3runtime[train]'") from error

_ORTHOGONAL = 1e-3
"""The most that products of a rotation's axes may differ from 0 and 1."""


def from_faiss(spec: MemorySpec, keys: "Path | faiss.Index", values: "Path | faiss.Index") -> ProductCodec:
    """A trained codec out of two trained indexes, or the files that `faiss.write_index` wrote of them.

    What the indexes contain besides their quantisers is left out. Raises `InputError` for a file that cannot be read,
    and `CodecError` for an index that is no product quantiser, of one or two levels, of vectors of the spec's head dim.
    """
    found = [_tables(index, spec.head_dim, name) for index, name in (_read(keys, "keys"), _read(values, "values"))]
    rotated = any(tables.rotation is not None for tables in found)
    tensors: dict[str, Tensor] = {}
    for name, tables in zip(("keys", "values"), found, strict=True):
        tensors |= tables.tensors(name)
        if rotated and tables.rotation is None:
            tensors[f"{name}.rotation"] = torch.eye(spec.head_dim)[None]  # leaves every bit as it is
    codec = ProductCodec(
        spec,
        keys=text_of(found[0].levels),
        values=text_of(found[1].levels),
        rotation="opq" if rotated else "none",
        scope="model",
        offset=False,
    )
    codec.restore(tensors)
    return codec


def to_faiss(codec: ProductCodec, part: str) -> "faiss.Index":
    """An empty index whose ``sa_encode`` and ``sa_decode`` are those of the codec's ``keys`` or ``values``.

    Raises `CodecError` if the codec is not trained or faiss has no such index.
    """
    quantiser = codec.quantiser
    if part not in ("keys", "values"):
        raise CodecError(f"a codec has keys and values, not {part!r}")
    if not isinstance(quantiser, ResidualQuantiser) or not quantiser.exchangeable:
        raise CodecError("faiss has indexes for codecs of scope model without offset and of two levels at most alone")
    index: faiss.Index = index_of(quantiser.keys if part == "keys" else quantiser.values)
    return index


def index_of(tables: Tables) -> Any:
    """The `faiss.Index` of one quantiser for the whole model. Raises `CodecError` if there are more."""
    first, *rest = tables.levels
    groups, parts, _, size = tables.centroids[0].shape
    if groups != 1 or len(rest) > 1:
        raise CodecError(f"faiss has no index for {groups} quantisers of levels {text_of(tables.levels)}")
    dim = parts * size
    # Not by `faiss.index_factory`, which crashes in a process that has imported usearch before faiss.
    if rest:
        coarse: Any = faiss.MultiIndexQuantizer(dim, first.parts, first.bits)
        index: Any = faiss.Index2Layer(coarse, 1 << first.parts * first.bits, rest[0].parts, rest[0].bits)
        coarse.this.disown()
        index.q1.own_fields, index.q1.quantizer_trains_alone = True, 1
        _fill(coarse.pq, tables.centroids[0])
        coarse.ntotal = 1 << first.parts * first.bits
        coarse.is_trained = True
    else:
        index = faiss.IndexPQ(dim, first.parts, first.bits)
    _fill(index.pq, tables.centroids[-1])
    index.is_trained = True
    if tables.rotation is None:
        return index
    turn = faiss.LinearTransform(dim, dim, tables.mean is not None)
    axes = tables.rotation[0].T.contiguous()
    faiss.copy_array_to_vector(axes.flatten().numpy(), turn.A)
    if tables.mean is not None:
        faiss.copy_array_to_vector((-(axes @ tables.mean[0])).numpy(), turn.b)
    turn.is_trained = turn.is_orthonormal = True
    return faiss.IndexPreTransform(turn, index)


def _read(source: "Path | faiss.Index", part: str) -> tuple[Any, str]:
    """An index, and what to call it in errors."""
    if not isinstance(source, str | Path):
        return source, f"the index for {part}"
    if not Path(source).is_file():
        raise InputError(f"{source}: there is no such file")
    try:
        return faiss.read_index(str(source)), str(source)
    except RuntimeError as error:
        raise InputError(f"{source}: not an index of faiss") from error


def _tables(index: Any, dim: int, name: str) -> Tables:
    """The learned tensors of an index, copied. Raises `CodecError` that begins with ``name``."""
    if index.d != dim:
        raise CodecError(f"{name}: its vectors have {index.d} channels, not {dim} as heads of this model")
    if not index.is_trained:
        raise CodecError(f"{name}: it is not trained")
    rotation = None
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        rotation = _rotation(inner, name)
        inner = faiss.downcast_index(inner.index)
    quantisers: list[Any]
    if isinstance(inner, faiss.Index2Layer):
        coarse = faiss.downcast_index(inner.q1.quantizer)  # type: ignore[attr-defined]
        if not isinstance(coarse, faiss.MultiIndexQuantizer):
            raise CodecError(f"{name}: its first level is a {type(coarse).__name__}, not a MultiIndexQuantizer")
        quantisers = [coarse.pq, inner.pq]
    elif isinstance(inner, faiss.IndexPQ):
        quantisers = [inner.pq]
    else:
        raise CodecError(f"{name}: a {type(inner).__name__} is neither an IndexPQ nor an Index2Layer")
    levels = tuple(Level(pq.M, pq.nbits) for pq in quantisers)
    if not all(level.bits in BITS for level in levels):
        raise CodecError(f"{name}: levels {text_of(levels)} must have {BITS[0]} to {BITS[-1]} bits each")
    centroids = []
    for pq, level in zip(quantisers, levels, strict=True):
        table = torch.from_numpy(faiss.vector_to_array(pq.centroids).copy())
        centroids.append(table.view(1, level.parts, level.centroids, dim // level.parts))
    if not all(torch.isfinite(table).all() for table in centroids):
        raise CodecError(f"{name}: its centroids are not finite")
    return Tables(levels, tuple(centroids), rotation, None)


def _rotation(index: Any, name: str) -> Tensor | None:
    """The rotation before an index, ``float32[1, dim, dim]``; None for an empty chain."""
    steps = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    if not steps:
        return None
    (turn, *more) = steps
    if more or not isinstance(turn, faiss.LinearTransform):
        kinds = ", ".join(type(step).__name__ for step in steps)
        raise CodecError(f"{name}: vectors go through {kinds}, not through one rotation")
    if turn.have_bias or turn.d_in != turn.d_out:
        raise CodecError(f"{name}: its {type(turn).__name__} from {turn.d_in} to {turn.d_out} channels is no rotation")
    axes = torch.from_numpy(faiss.vector_to_array(turn.A).copy()).view(turn.d_out, turn.d_in)
    if not ((axes @ axes.T - torch.eye(turn.d_in)).abs() <= _ORTHOGONAL).all():
        raise CodecError(f"{name}: its {type(turn).__name__} is not orthogonal")
    return axes.T.contiguous()[None]


def _fill(pq: Any, table: Tensor) -> None:
    faiss.copy_array_to_vector(table.flatten().numpy(), pq.centroids)
