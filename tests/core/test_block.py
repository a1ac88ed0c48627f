import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.errors import BlockError
from m3runtime.memory.block import HEADER_BYTES, BlockStamp, Rows, check, distinct, headers, length, seal, without
from m3runtime.testing.blocks import STAMP, make_blocks, make_ids

ids = st.integers(0, 2**64 - 1)


def sealed(id: int, payload: bytes, rest: int = 0) -> Rows:
    block = np.zeros(HEADER_BYTES + len(payload) + rest, np.uint8)
    block[HEADER_BYTES : HEADER_BYTES + len(payload)] = np.frombuffer(payload, np.uint8)
    seal(block, id=id, tokens=3, payload_bytes=len(payload), stamp=STAMP)
    return block


@given(ids, st.binary(max_size=300), st.integers(0, 50))
def test_a_sealed_block_is_right(id: int, payload: bytes, rest: int) -> None:
    block = sealed(id, payload, rest)
    assert check(block, id=id, stamp=STAMP) == length(block) == HEADER_BYTES + len(payload)
    header = headers(block[None])[0]
    assert (int(header["id"]), int(header["tokens"]), int(header["payload"])) == (id, 3, len(payload))


@given(ids, st.binary(max_size=300), st.data())
def test_any_flipped_bit_is_found(id: int, payload: bytes, data: st.DataObject) -> None:
    block = sealed(id, payload)
    bit = data.draw(st.integers(0, 8 * len(block) - 1))
    block[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockError, match=f"block {id}: "):
        check(block, id=id, stamp=STAMP)


def test_every_flipped_bit_of_one_block_is_found() -> None:
    block = sealed(2**64 - 1, bytes(range(40)))
    for bit in range(8 * len(block)):
        block[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlockError):
            check(block, id=2**64 - 1, stamp=STAMP)
        block[bit // 8] ^= 1 << bit % 8
    check(block, id=2**64 - 1, stamp=STAMP)


@given(ids, st.binary(max_size=300), st.integers(0, 50))
def test_bytes_behind_a_block_do_not_matter(id: int, payload: bytes, rest: int) -> None:
    block = sealed(id, payload, rest)
    block[HEADER_BYTES + len(payload) :] = 0xFF
    check(block, id=id, stamp=STAMP)


@given(ids, st.binary(min_size=1, max_size=300), st.data())
def test_a_truncated_block_is_found(id: int, payload: bytes, data: st.DataObject) -> None:
    block = sealed(id, payload)
    end = data.draw(st.integers(0, len(block) - 1))
    with pytest.raises(BlockError):
        check(block[:end], id=id, stamp=STAMP)
    if block[end:].any():  # the rest of the slot overwritten with zeros
        block[end:] = 0
        with pytest.raises(BlockError):
            check(block, id=id, stamp=STAMP)


@given(st.binary(max_size=400).map(lambda raw: np.frombuffer(raw, np.uint8)))
def test_arbitrary_bytes_are_no_block(block: Rows) -> None:
    with pytest.raises(BlockError):
        check(block, id=0, stamp=STAMP)


def test_a_block_of_another_id_bank_or_codec_is_found() -> None:
    block = make_blocks(make_ids(7))[0].numpy()
    check(block, id=7, stamp=STAMP)
    with pytest.raises(BlockError, match="block 8: holds block 7"):
        check(block, id=8, stamp=STAMP)
    with pytest.raises(BlockError, match="another bank"):
        check(block, id=7, stamp=BlockStamp("0d" * 16, STAMP.codec))
    with pytest.raises(BlockError, match="another codec"):
        check(block, id=7, stamp=BlockStamp(STAMP.bank, "0d" * 16))


@given(st.lists(ids), st.lists(ids))
def test_sets_of_ids(some: list[int], others: list[int]) -> None:
    one, other = (distinct(np.array(given, np.uint64)) for given in (some, others))
    assert one.tolist() == sorted(set(some))
    assert without(one, other).tolist() == sorted(set(some) - set(others))
