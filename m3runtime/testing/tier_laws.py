"""Base of the laws of a tier: how to make one, its back door, and calls of all its methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from m3runtime.memory.block import HEADER_BYTES, Found, Ids, headers
from m3runtime.storage.tier import Tier
from m3runtime.testing.blocks import make_blocks, make_ids

UNKNOWN = 77
"""An id that no law writes."""


def read(tier: Tier, ids: Ids) -> tuple[Found, Tensor]:
    """Which ids are found, and the rows on the CPU, which hold 0xEE before."""
    out = torch.full((len(ids), tier.slot_bytes), 0xEE, dtype=torch.uint8)
    return tier.read(ids, out), out


def check_read(tier: Tier, ids: Ids, made: Tensor | None = None) -> Found:
    """Read, and fail unless each row is its id's block, or was not found and not touched.

    ``made`` are the blocks of these ids, where they have been made already.
    """
    found, out = read(tier, ids)
    assert found.dtype == np.bool_
    assert found.shape == ids.shape
    expected = make_blocks(ids, tier.slot_bytes) if made is None else made
    ends = HEADER_BYTES + headers(expected.numpy())["payload"].astype(np.int64)
    differ = (out.numpy() != expected.numpy()) & (np.arange(tier.slot_bytes) < ends[:, None])
    wrong = ids[found & differ.any(1)]
    assert not len(wrong), f"ids {wrong.tolist()} came back with other bytes"
    touched = ids[~found & (out.numpy() != 0xEE).any(1)]
    assert not len(touched), f"ids {touched.tolist()} were missed, and their rows touched"
    return found


def write(tier: Tier, ids: Ids) -> None:
    """Write the blocks of ids."""
    tier.write(ids, make_blocks(ids, tier.slot_bytes))


class TierLaws(ABC):
    """The base of the themes that `TierContract` joins: how to make a tier, and its back door.

    `raw_read` and `raw_write` are a back door to the storage that goes around the tier's own methods: so `read` is
    tested without trusting `write`, and `write` without trusting `read`.
    """

    folder: Path
    """An empty folder of each test's own, for a tier that keeps files."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "files"
        self.folder.mkdir()

    @pytest.fixture
    @abstractmethod
    def tier(self) -> Tier | Iterator[Tier]:
        """A new tier with slots of `SLOT_BYTES` and room for at least 16 blocks; closed afterwards."""

    @abstractmethod
    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        """The bytes that the open tier's storage has for ``id``, or None. More may follow the block."""

    @abstractmethod
    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        """Put these bytes into the open tier's storage as the block of ``id``, whatever they are. The tier has room.

        Where the tier keeps a table or a policy of what it holds, tell those too.
        """

    def calls(self, tier: Tier, ids: Ids) -> Sequence[Callable[[], object]]:
        """Every method once, on ``ids`` that are held, so that all can be called again. A closed tier refuses each."""
        none = make_ids()
        return [
            lambda: read(tier, ids),
            lambda: read(tier, none),
            lambda: write(tier, ids),
            lambda: write(tier, none),
            lambda: tier.contains(ids),
            lambda: tier.contains(none),
            lambda: int(ids[0]) in tier,
            lambda: len(tier),
            lambda: tier.discard(make_ids(UNKNOWN)),
            lambda: tier.discard(none),
        ]
