"""The `Tier` contract, and the `CachingTier` above the home."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from m3runtime.errors import InputError
from m3runtime.memory.block import Found, Ids

if TYPE_CHECKING:
    from torch import Tensor, device

Scores = npt.NDArray[np.float32]
"""Retrieval scores of ids, each in [-1, 1]."""


def check_ids(ids: Ids) -> None:
    """Raise `InputError` unless ``ids`` is ``uint64[n]``."""
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise InputError(f"ids must be uint64[n], not {ids.dtype}{list(ids.shape)}")


def check_rows(ids: Ids, rows: "Tensor", slot_bytes: int) -> None:
    """Raise `InputError` unless ``ids`` is ``uint64[n]`` and ``rows`` is ``uint8[n, slot_bytes]``."""
    check_ids(ids)
    if tuple(rows.shape) != (len(ids), slot_bytes) or rows.element_size() != 1:
        raise InputError(f"blocks must be uint8[{len(ids)}, {slot_bytes}], not {rows.dtype}{list(rows.shape)}")


class Tier(ABC):
    """One level of storage that holds blocks.

    Laws: a miss is a value, a fault is a typed exception. `read` after `write` gives the same bytes, or a
    miss where the tier may evict; never other bytes. Blocks are immutable and an id is never used again.
    Every method may be called from any thread. Closing twice is fine; using a closed tier raises
    `TierClosedError`.
    """

    name: str
    """For metrics and messages, such as ``pinned``."""
    slot_bytes: int

    @abstractmethod
    def read(self, ids: Ids, out: "Tensor") -> Found:
        """Copy blocks into rows of ``out``: ``uint8[n, slot_bytes]``, on any device that the tier can copy to.

        Row ``i`` is filled where the result is true and untouched where it is false. Rows on an accelerator are filled
        in the order of its current stream.
        """

    @abstractmethod
    def write(self, ids: Ids, blocks: "Tensor") -> None:
        """Hold blocks, rows of ``uint8[n, slot_bytes]``. A caching tier may evict others, or not admit one.

        After an error each block is held whole or not at all.
        """

    @abstractmethod
    def discard(self, ids: Ids) -> None:
        """Drop these blocks. Unknown ids are ignored."""

    @abstractmethod
    def contains(self, ids: Ids) -> Found:
        """``bool[n]``: the ids that are held now. Not a use."""

    def __contains__(self, id: int) -> bool:
        return bool(self.contains(np.array([id], np.uint64))[0])

    @abstractmethod
    def __len__(self) -> int:
        """The number of blocks held."""

    @property
    @abstractmethod
    def capacity(self) -> int | None:
        """The most bytes of blocks held, or None for a tier without a bound."""

    @abstractmethod
    def close(self) -> None:
        """Release all memory and files. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CachingTier(Tier):
    """A bounded tier above the home."""

    device: "device"
    can_rot: bool = False
    """May held bytes change (a drive, a network)? The hierarchy then checks every digest."""

    def score(self, ids: Ids, scores: Scores) -> None:
        """Note the retrieval scores of ids that were chosen. Ids that are not held are ignored.

        Only tiers whose eviction looks at scores override it.
        """


def read_by_host(tier: Tier, ids: Ids, out: "Tensor") -> Found:
    """`Tier.read` into ``out`` on a device, of a tier that reads into the host's memory."""
    import torch  # sources are compared without it

    staging = torch.empty(out.shape, dtype=torch.uint8)
    found = tier.read(ids, staging)
    rows = torch.from_numpy(np.flatnonzero(found))
    out[rows.to(out.device)] = staging[rows].to(out.device)
    return found
