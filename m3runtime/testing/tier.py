"""`TierContract`: the laws of every tier."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from m3runtime.block import Found, Ids
from m3runtime.errors import TierClosedError
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, make_blocks, make_ids, same_block
from m3runtime.tier import Tier


def read(tier: Tier, ids: Ids) -> tuple[Found, Tensor]:
    """What is found, and the rows on the CPU. Rows hold 0xEE before."""
    out = torch.full((len(ids), tier.slot_bytes), 0xEE, dtype=torch.uint8)
    return tier.read(ids, out), out


def check_read(tier: Tier, ids: Ids) -> Found:
    """Read, and fail unless each row is its id's block, or was not found and not touched."""
    found, out = read(tier, ids)
    assert found.dtype == np.bool_
    assert found.shape == ids.shape
    for row, made in enumerate(make_blocks(ids, tier.slot_bytes)):
        if found[row]:
            assert same_block(out[row], made), f"id {ids[row]} came back with other bytes"
        else:
            assert bool((out[row] == 0xEE).all()), f"id {ids[row]} was missed, and its row touched"
    return found


def write(tier: Tier, ids: Ids) -> None:
    """Write the blocks of ids."""
    tier.write(ids, make_blocks(ids, tier.slot_bytes))


def together(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` in threads that start at once; raise what any of them raised."""
    start, errors = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


class TierContract(ABC):
    """What every tier keeps. Use `CachingTierContract` or `HomeContract`, which say how to make one."""

    @pytest.fixture
    @abstractmethod
    def tier(self, tmp_path: Path) -> Tier | Iterator[Tier]:
        """A new tier with slots of `SLOT_BYTES` and room for at least 16 blocks; closed afterwards."""

    def test_is_empty_at_first(self, tier: Tier) -> None:
        assert len(tier) == 0
        assert tier.slot_bytes == SLOT_BYTES
        assert tier.name
        assert 5 not in tier
        assert not check_read(tier, make_ids(0, 5, LAST_ID)).any()

    def test_reads_what_was_written(self, tier: Tier) -> None:
        ids = make_ids(0, 3, 7, LAST_ID)
        write(tier, ids)
        assert len(tier) == 4
        assert tier.contains(ids).all()
        assert check_read(tier, ids).all()
        assert check_read(tier, ids[::-1].copy()).all()

    def test_hits_and_misses_in_one_batch(self, tier: Tier) -> None:
        write(tier, make_ids(2, 4, 6))
        ids = make_ids(1, 2, 3, 4, 4, 5, 6)
        expected = [False, True, False, True, True, False, True]
        assert check_read(tier, ids).tolist() == expected
        assert tier.contains(ids).tolist() == expected

    def test_reads_into_rows_of_a_larger_slab(self, tier: Tier) -> None:
        write(tier, make_ids(8, 9))
        slab = torch.zeros((6, SLOT_BYTES), dtype=torch.uint8)
        assert tier.read(make_ids(8, 9), slab[2:4]).all()
        assert same_block(slab[3], make_blocks(make_ids(9))[0])
        assert not slab[:2].any()
        assert not slab[4:].any()

    def test_empty_batches(self, tier: Tier) -> None:
        write(tier, make_ids(1))
        none = make_ids()
        write(tier, none)
        tier.discard(none)
        assert check_read(tier, none).tolist() == []
        assert tier.contains(none).tolist() == []
        assert len(tier) == 1

    def test_an_id_twice_in_a_batch_is_held_once(self, tier: Tier) -> None:
        write(tier, make_ids(5, 5, 6, 5))
        assert len(tier) == 2
        assert check_read(tier, make_ids(5, 6, 5)).all()

    def test_writing_again_changes_nothing(self, tier: Tier) -> None:
        write(tier, make_ids(5))
        write(tier, make_ids(5, 6))
        write(tier, make_ids(6, 5))
        assert len(tier) == 2
        assert check_read(tier, make_ids(5, 6)).all()

    def test_keeps_its_own_copy(self, tier: Tier) -> None:
        ids = make_ids(1, 2)
        blocks = make_blocks(ids)
        tier.write(ids, blocks)
        blocks.zero_()
        found, out = read(tier, ids)
        out.zero_()
        assert found.all()
        assert check_read(tier, ids).all()

    def test_discards(self, tier: Tier) -> None:
        write(tier, make_ids(1, 2, 3))
        tier.discard(make_ids(2, 2, 99, 3))
        assert check_read(tier, make_ids(1, 2, 3)).tolist() == [True, False, False]
        assert len(tier) == 1
        assert 2 not in tier

    def test_closes_twice_and_then_refuses_everything(self, tier: Tier) -> None:
        ids = make_ids(1)
        write(tier, ids)
        tier.close()
        tier.close()
        for use in (
            lambda: read(tier, ids),
            lambda: write(tier, ids),
            lambda: tier.discard(ids),
            lambda: tier.contains(ids),
            lambda: len(tier),
        ):
            with pytest.raises(TierClosedError):
                use()

    def test_is_a_context_manager(self, tier: Tier) -> None:
        with tier as same:
            assert same is tier
        with pytest.raises(TierClosedError):
            len(tier)

    def test_threads_get_their_own_bytes(self, tier: Tier) -> None:
        def work(number: int) -> None:
            random = Random(number)
            for turn in range(40):
                ids = make_ids(*(random.randrange(12) for _ in range(random.randrange(1, 6))))
                if turn % 3 == 0:
                    write(tier, ids)
                check_read(tier, ids)

        write(tier, make_ids(*range(12)))
        together(6, work)
        assert check_read(tier, make_ids(*range(12))).all()
