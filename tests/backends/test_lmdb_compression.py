from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from m3backends.lmdb import LmdbHome
from m3backends.lmdb_compression import ZSTD, unpack
from m3runtime.block import HEADER_BYTES, check, seal
from m3runtime.errors import BlockError
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_ids
from m3runtime.tier import Batch, Home
from tests.backends.lmdb_contract import LmdbContract


class TestCompressedLmdbHome(LmdbContract):
    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        return LmdbHome(path=folder, slot_bytes=SLOT_BYTES, compression="zstd", read_only=read_only)


def dull(id: int, slot_bytes: int = SLOT_BYTES) -> np.ndarray:
    """A block whose payload is small once compressed."""
    block = np.full(slot_bytes, 7, np.uint8)
    seal(block, id=id, tokens=1, payload_bytes=slot_bytes - HEADER_BYTES, stamp=STAMP)
    return block


def dull_batch(ids: list[int]) -> Batch:
    return replace(make_batch(ids), blocks=torch.from_numpy(np.stack([dull(id) for id in ids])))


def records(folder: Path) -> list[bytes]:
    with lmdb.open(str(folder), max_dbs=16, readonly=True) as env:
        db = env.open_db(b"blocks", create=False)
        with env.begin(db=db) as txn:
            return [bytes(value) for _, value in txn.cursor()]


def test_a_compressed_block_reads_as_it_was_under_either_setting(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES, compression="zstd") as home:
        home.commit(dull_batch([1, 2]))
    assert all(len(value) < SLOT_BYTES for value in records(tmp_path))
    with LmdbHome(path=tmp_path) as home:
        home.commit(dull_batch([3]))
    assert sorted(len(value) == SLOT_BYTES for value in records(tmp_path)) == [False, False, True]
    with LmdbHome(path=tmp_path, compression="zstd") as home:
        out = torch.full((3, SLOT_BYTES), 255, dtype=torch.uint8)
        assert home.read(make_ids(1, 2, 3), out).all()
    for row, id in enumerate([1, 2, 3]):
        assert np.array_equal(out[row].numpy(), dull(id))


@given(noise=st.binary(min_size=SLOT_BYTES - HEADER_BYTES, max_size=SLOT_BYTES - HEADER_BYTES))
def test_a_block_is_never_stored_larger(noise: bytes) -> None:
    block = dull(5)
    block[HEADER_BYTES:] = np.frombuffer(noise, np.uint8)
    stored = memoryview(bytes(ZSTD.packer()(block)))
    assert len(stored) <= len(block)
    assert np.array_equal(unpack(stored, SLOT_BYTES), block)


@given(at=st.integers(min_value=0), flip=st.integers(1, 255))
def test_a_flipped_byte_of_a_frame_never_passes_the_check(at: int, flip: int) -> None:
    frame = bytearray(ZSTD.packer()(dull(5)))
    frame[at % len(frame)] ^= flip
    row = np.zeros(SLOT_BYTES, np.uint8)
    content = unpack(memoryview(bytes(frame)), SLOT_BYTES)[:SLOT_BYTES]
    row[: len(content)] = content
    try:
        check(row, id=5, stamp=STAMP)
    except BlockError:
        return
    assert np.array_equal(row, dull(5))  # a bit that zstd does not use


@pytest.mark.parametrize("size", [SLOT_BYTES + 1, 1 << 40])
def test_a_frame_that_holds_more_than_a_slot_is_not_decompressed(size: int) -> None:
    if size > 1 << 20:  # a header that lies: single segment, eight bytes of content size
        frame = zstandard.FRAME_HEADER + bytes([0xE0]) + size.to_bytes(8, "little") + bytes([1, 0, 0])
        assert zstandard.frame_content_size(frame) == size
    else:
        frame = zstandard.ZstdCompressor().compress(bytes(size))
    assert len(unpack(memoryview(frame), SLOT_BYTES)) == 0


def test_a_frame_cut_short_is_no_block() -> None:
    frame = bytes(ZSTD.packer()(dull(5)))
    assert len(unpack(memoryview(frame[:-1]), SLOT_BYTES)) == 0
    assert len(unpack(memoryview(frame[:4]), SLOT_BYTES)) == 0
