"""Checks of the blocks and references that a home is given to store."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.memory.block import HEADER_BYTES, Ids, Rows, distinct, headers
from m3runtime.storage.tier import check_rows

if TYPE_CHECKING:
    from torch import Tensor


def without_padding(ids: Ids, blocks: "Tensor", slot_bytes: int) -> list[Rows]:
    """The bytes of each block, ``uint8[n, slot_bytes]``, on the CPU. Raises `InputError` if its header does not fit."""
    check_rows(ids, blocks, slot_bytes)
    if not len(ids):
        return []
    if slot_bytes < HEADER_BYTES:
        raise InputError(f"slots of {slot_bytes} bytes hold no block")
    rows = blocks.cpu().contiguous().numpy()
    header = headers(rows)
    ends = HEADER_BYTES + header["payload"].astype(np.int64)
    wrong = np.flatnonzero((header["id"] != ids) | (ends > slot_bytes))
    if len(wrong):
        raise InputError(f"id {ids[wrong[0]]} comes with bytes that are not its block")
    return [row[:end] for row, end in zip(rows, ends.tolist(), strict=True)]


def checked_embeddings(
    ids: Ids, references: Sequence[Reference], embeddings: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The embeddings of new references, ``float32[n, dim]``, contiguous and little-endian.

    Raises `InputError` if ids, references and embeddings do not belong together, an id stands twice, a reference has
    no place, or an embedding is not finite.
    """
    count = len(ids)
    vectors = np.ascontiguousarray(embeddings, "<f4")
    if len(references) != count or vectors.ndim != 2 or len(vectors) != count:
        raise InputError(f"a batch of {count} ids has {len(references)} references, embeddings {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise InputError("a batch has embeddings that are not finite")
    if len(distinct(ids)) != count:
        raise InputError("a batch has an id twice")
    if not all(reference.places for reference in references):
        raise InputError("a batch has a reference without a place")
    return vectors
