"""Blocks of a Lance home in a folder: they are read from its files, and are those that the library reads."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lance")

from m3backends.lance import block_files
from m3backends.lance.block_files import BlockFiles
from m3backends.lance.home import LanceHome
from m3runtime.errors import TierError
from m3runtime.memory import block
from m3runtime.memory.block import HEADER_BYTES, as_ids
from m3runtime.testing.blocks import STAMP, make_ids

SIZES = (1000, 60_000, 100_000, 5_000_000)
"""Bytes of blocks: in the file of rows, in one of several blobs, and in one of its own."""
SLOT = max(SIZES)


def made(id: int) -> torch.Tensor:
    row = torch.from_numpy(np.random.default_rng(id).integers(0, 256, SLOT, dtype=np.uint8))
    size = SIZES[id % len(SIZES)]
    block.seal(row.numpy(), id=id, tokens=1, payload_bytes=size - HEADER_BYTES, stamp=STAMP)
    row[size:] = 0
    return row


@pytest.fixture
def home(tmp_path: Path) -> Iterator[LanceHome]:
    with LanceHome(path=tmp_path / "home", slot_bytes=SLOT, durability="commit") as home:
        for start in (0, 4):
            ids = as_ids(range(start, start + 4))
            home.write(ids, torch.stack([made(id) for id in ids.tolist()]))
        yield home


def check(home: LanceHome, *ids: int, missing: int | None = None) -> None:
    out = torch.full((len(ids), SLOT), 7, dtype=torch.uint8)
    found = home.read(make_ids(*ids), out)
    assert found.tolist() == [id != missing for id in ids]
    for id, row, there in zip(ids, out, found.tolist(), strict=True):
        assert not there or torch.equal(row, made(id)), id


@pytest.fixture
def reads(home: LanceHome, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `BlockFiles.read` returned."""
    returned, read = list[bool](), BlockFiles.read

    def noted(*arguments: object) -> bool:
        returned.append(read(*arguments))  # type: ignore[arg-type]
        return returned[-1]

    monkeypatch.setattr(BlockFiles, "read", noted)
    return returned


@pytest.mark.parametrize("most", [block_files._MOST, 0])
def test_blocks_of_every_size_come_from_the_files(
    home: LanceHome, reads: list[bool], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(block_files, "_MOST", most)
    check(home, 7, 0, 3, 5, 3, 2, 9, 1, missing=9)
    home.discard(make_ids(3))
    check(home, 3, 7, missing=3)
    home.compact()
    check(home, 7, 3, 0, missing=3)
    home.write(make_ids(10), made(10)[None])
    check(home, 10, 7)
    assert reads == [True] * len(reads)


def test_another_process_compacts_between_two_reads(home: LanceHome, reads: list[bool]) -> None:
    check(home, 0, 1, 2)
    with LanceHome(path=home.path) as other:
        other.discard(make_ids(1))
        other.compact()
    check(home, 0, 1, 2, missing=1)
    assert reads[-1]


def test_a_file_that_is_cut_or_gone_is_read_by_the_library_which_says_so(home: LanceHome, reads: list[bool]) -> None:
    check(home, 3)
    large = max((home.path / "data").rglob("*.blob"), key=lambda file: file.stat().st_size)
    os.truncate(large, 1000)
    with pytest.raises(TierError) as raised:
        check(home, 3, 7)
    assert "\n" not in str(raised.value)
    large.unlink()
    with pytest.raises(TierError):
        check(home, 3, 7)
    assert not reads[-1]
    check(home, 0, 1)


def test_a_kind_of_blob_that_is_unknown_is_read_by_the_library(
    home: LanceHome, reads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_files, "_DEDICATED", -1)
    check(home, 3, 0)
    assert reads == [False]
