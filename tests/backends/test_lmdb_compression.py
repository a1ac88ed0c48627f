from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from m3backends.lmdb.compression import ENOUGH, ZSTD, decide, unpack
from m3backends.lmdb.home import LmdbHome
from m3runtime.errors import BankError, BlockError, InputError
from m3runtime.memory.block import HEADER_BYTES, check, seal
from m3runtime.storage.home import Batch, Home
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_ids
from m3runtime.testing.threads import together
from tests.backends.lmdb_contract import LmdbContract
from tests.backends.lmdb_raw import change, flipped, sealed
from tests.forked import Program


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


BIG = 64 << 10


def sealed_block(id: int, content: np.ndarray) -> np.ndarray:
    block = content.copy()
    seal(block, id=id, tokens=1, payload_bytes=BIG - HEADER_BYTES, stamp=STAMP)
    return block


def noise(id: int) -> np.ndarray:
    """A block that nothing makes smaller."""
    return sealed_block(id, np.random.default_rng(id).integers(0, 256, BIG, np.uint8))


def nibbles(id: int) -> np.ndarray:
    """A block of few values, which others of its kind do not share."""
    random = np.random.default_rng(id)
    return sealed_block(id, random.permutation(256).astype(np.uint8)[random.integers(0, 16, BIG)])


def alike(id: int) -> np.ndarray:
    """A block that has much in common with others of its kind and nothing within itself."""
    content = np.random.default_rng(0).integers(0, 256, BIG, np.uint8)
    content[BIG // 3 :] = noise(id)[BIG // 3 :]
    return sealed_block(id, content)


def batch_of(make: Callable[[int], np.ndarray], ids: Iterable[int]) -> Batch:
    batch = make_batch(ids, BIG)
    return replace(batch, blocks=torch.from_numpy(np.stack([make(id) for id in batch.ids.tolist()])))


def check_blocks(home: Home, make: Callable[[int], np.ndarray], ids: range) -> None:
    out = torch.full((len(ids), BIG), 255, dtype=torch.uint8)
    assert home.read(make_ids(*ids), out).all()
    assert np.array_equal(out.numpy(), np.stack([make(id) for id in ids]))


@pytest.mark.parametrize(("make", "method"), [(noise, b"none"), (nibbles, b"zstd"), (alike, b"dictionary")])
@pytest.mark.parametrize("commits", [1, 4])
def test_the_first_blocks_decide_how_blocks_are_packed(
    tmp_path: Path, make: Callable[[int], np.ndarray], method: bytes, commits: int
) -> None:
    each = ENOUGH // commits
    with LmdbHome(path=tmp_path, slot_bytes=BIG, compression="zstd") as home:
        for first in range(0, ENOUGH, each):
            assert packing(home) is None
            home.commit(batch_of(make, range(first, first + each)))
        assert packing(home) == method
        home.commit(batch_of(make, range(100, 110)))
        check_blocks(home, make, range(ENOUGH))
        check_blocks(home, make, range(100, 110))
    for compression in ("none", "zstd"):
        with LmdbHome(path=tmp_path, compression=compression) as home:  # type: ignore[arg-type]
            check_blocks(home, make, range(100, 110))
            start = home.next_id()
            home.commit(batch_of(make, range(start, start + 2)))
            check_blocks(home, make, range(start, start + 2))
            assert packing(home) == method
    sizes = [len(value) for value in records(tmp_path)]
    packed = sizes[ENOUGH : ENOUGH + 10]
    assert all(size == BIG if method == b"none" else size < 0.9 * BIG for size in packed)
    assert sizes[-4:-2] == [BIG] * 2  # what was written without compression


def packing(home: LmdbHome) -> bytes | None:
    """What the home recorded."""
    return home._environment.read(lambda txn: home._db.home.read(txn, b"packing", bytes))


def test_nothing_is_decided_where_nothing_is_to_be_compressed(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=BIG) as home:
        home.commit(batch_of(alike, range(ENOUGH)))
        assert packing(home) is None
    with LmdbHome(path=tmp_path, compression="zstd") as home:
        home.commit(batch_of(alike, [100]))
        assert packing(home) == b"dictionary"


def test_threads_decide_once(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=BIG, compression="zstd") as home:

        def work(_: int) -> None:
            for _ in range(30):
                with suppress(InputError):
                    start = home.next_id()
                    home.commit(batch_of(alike, range(start, start + ENOUGH)))
                    check_blocks(home, alike, range(start, start + ENOUGH))
                    return

        home.write(make_ids(*range(4)), torch.from_numpy(np.stack([alike(id) for id in range(4)])))
        together(4, work)
        assert packing(home) == b"dictionary"


READER = """
import sys, torch
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_ids
from m3runtime.memory.block import check
from m3runtime.testing.blocks import STAMP

with LmdbHome(path=sys.argv[1], read_only=True) as home:
    print(len(home), flush=True)
    sys.stdin.readline()
    out = torch.zeros((1, home.slot_bytes), dtype=torch.uint8)
    assert home.read(make_ids(100), out).all()
    print(check(out[0].numpy(), id=100, stamp=STAMP), flush=True)
"""


def test_a_reader_that_was_open_before_reads_what_needs_the_dictionary(tmp_path: Path) -> None:
    with (
        LmdbHome(path=tmp_path, slot_bytes=BIG, compression="zstd") as home,
        Program(READER, tmp_path) as process,
    ):
        assert process.stdout.readline() == "0\n"
        home.commit(batch_of(alike, range(ENOUGH)))
        home.commit(batch_of(alike, [100]))
        assert process.ask() == f"{BIG}\n"


@pytest.fixture
def with_dictionary(tmp_path: Path) -> Path:
    with LmdbHome(path=tmp_path, slot_bytes=BIG, compression="zstd") as home:
        home.commit(batch_of(alike, range(ENOUGH)))
        home.commit(batch_of(alike, [100]))
    return tmp_path


def test_a_frame_that_needs_a_dictionary_which_is_not_there_is_a_damaged_block(with_dictionary: Path) -> None:
    for key in (b"packing", b"dictionary"):
        change(with_dictionary, "home", key, lambda _: None)
    with LmdbHome(path=with_dictionary, read_only=True) as home:
        out = torch.zeros((1, BIG), dtype=torch.uint8)
        assert home.read(make_ids(100), out).all()
        with pytest.raises(BlockError):
            check(out[0].numpy(), id=100, stamp=STAMP)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"dictionary", b"flipped"),
        (b"dictionary", None),
        (b"dictionary", b"raw content is no dictionary that was trained"),
        (b"dictionary", b"\x37\xa4\x30\xec" + b"abcd" * 9),
        (b"packing", None),
        (b"packing", b"lzma"),
        (b"packing", b"zstd"),
    ],
)
def test_a_home_whose_dictionary_is_damaged_is_refused(with_dictionary: Path, key: bytes, value: bytes | None) -> None:
    def changed(stored: bytes) -> bytes | None:
        if value == b"flipped":
            return flipped(stored, 1000)
        return None if value is None else sealed("home", key, value)

    change(with_dictionary, "home", key, changed)
    with pytest.raises(BankError, match="is damaged"):
        LmdbHome(path=with_dictionary)


def test_a_frame_that_does_not_say_how_much_it_holds_is_not_decompressed() -> None:
    """Such a frame of 16 KiB holds 512 MiB."""
    writer = zstandard.ZstdCompressor(level=1).compressobj()
    frame = b"".join(writer.compress(bytes(1 << 20)) for _ in range(64)) + writer.flush()
    assert zstandard.frame_content_size(frame) == -1
    assert len(frame) < 1 << 16
    assert len(unpack(memoryview(frame), SLOT_BYTES)) == 0


def test_a_frame_that_holds_more_than_it_says() -> None:
    """A header that states a slot, before the body of a frame that holds a thousand."""
    body = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(1000 * SLOT_BYTES)))
    honest = zstandard.get_frame_parameters(bytes(body))
    at = body.index(honest.content_size.to_bytes(4, "little"))
    body[at : at + 4] = SLOT_BYTES.to_bytes(4, "little")
    assert zstandard.frame_content_size(bytes(body)) == SLOT_BYTES
    assert len(unpack(memoryview(bytes(body)), SLOT_BYTES)) == 0


def test_deciding_looks_at_few_blocks_where_they_are_large() -> None:
    large = [np.random.default_rng(id).integers(0, 4, 4 << 20, np.uint8) for id in range(10)]
    assert decide(large).method == "zstd"
