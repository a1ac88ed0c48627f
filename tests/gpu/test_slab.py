"""What only a device shows of slabs: order among streams, exact page-locked memory, threads on streams of their own."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import GpuTier, PinnedTier
from m3runtime.assembly import open_tiers
from m3runtime.config.schema import Config
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.storage.defaults import default_tiers
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.slab import SlabTier
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, same_block

pytestmark = pytest.mark.gpu

KINDS = [GpuTier, PinnedTier]
MIB = 1024**2
LONG = 300_000_000
"""Clock cycles of a kernel that outlasts any copy here: some 0.15 s."""


@pytest.fixture
def device() -> torch.device:
    return resolve("cuda")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def tier(request: pytest.FixtureRequest, device: torch.device) -> Iterator[SlabTier]:
    with request.param(slot_bytes=MIB, capacity=4 * MIB, device=device) as tier:
        yield tier


def rows(*ids: int) -> torch.Tensor:
    """Rows of a MiB, each full of its id."""
    return torch.stack([torch.full((MIB,), id, dtype=torch.uint8) for id in ids])


def busy() -> torch.cuda.Stream:
    """A stream with a long kernel in it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
    return stream


def test_a_read_waits_for_no_other_stream(tier: SlabTier, device: torch.device) -> None:
    tier.write(make_ids(1, 2), rows(1, 2).to(device))
    out = torch.zeros(2, MIB, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    other = busy()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert tier.read(make_ids(2, 1), out).all()
        torch.cuda.current_stream().synchronize()
    assert not other.query(), "the read waited for a stream that has nothing to do with it"
    assert out[:, -1].tolist() == [2, 1]


def test_a_read_on_a_busy_stream_returns_at_once_and_holds_up_nobody(tier: SlabTier, device: torch.device) -> None:
    tier.write(make_ids(1, 2), rows(1, 2).to(device))
    torch.cuda.synchronize()
    stream = busy()
    out = torch.zeros(1, MIB, dtype=torch.uint8, device=device)
    found: list[int] = []

    def another() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = torch.zeros(1, MIB, dtype=torch.uint8, device=device)
            tier.read(make_ids(2), mine)
            found.append(int(mine[0, -1]))  # which waits for this stream alone

    with torch.cuda.stream(stream):
        assert tier.read(make_ids(1), out).all()
        assert not stream.query(), "the read waited for the kernel"
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        assert not stream.query(), "the other read waited for the kernel"
        result = out[0, -1] + 0  # in the order of the stream
    assert found == [2]
    stream.synchronize()
    assert int(result) == 1


def test_what_another_stream_writes_is_read_after_it_is_there(device: torch.device) -> None:
    with GpuTier(slot_bytes=MIB, capacity=2 * MIB, device=device) as tier:
        late = torch.zeros(1, MIB, dtype=torch.uint8, device=device)
        out = torch.zeros(1, MIB, dtype=torch.uint8, device=device)
        torch.cuda.synchronize()
        stream = busy()
        with torch.cuda.stream(stream):
            late.fill_(7)
            tier.write(make_ids(1), late)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert tier.read(make_ids(1), out).all()
            assert int(out[0, -1]) == 7


def test_a_slot_is_not_filled_again_before_the_copy_out_of_it_is_done(tier: SlabTier, device: torch.device) -> None:
    tier.write(make_ids(1, 2, 3, 4), rows(1, 2, 3, 4).to(device))
    out = torch.zeros(4, MIB, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    stream = busy()
    with torch.cuda.stream(stream):
        assert tier.read(make_ids(1, 2, 3, 4), out).all()
    with torch.cuda.stream(torch.cuda.Stream()):
        tier.write(make_ids(5, 6, 7, 8), rows(5, 6, 7, 8).to(device))  # evicts all, or is not admitted
        tier.discard(make_ids(1, 2, 3, 4))
        tier.write(make_ids(9, 10), rows(9, 10).to(device))
    torch.cuda.synchronize()
    assert out[:, 0].tolist() == out[:, -1].tolist() == [1, 2, 3, 4]
    held = [id for id in range(1, 11) if id in tier]
    again = torch.zeros(len(held), MIB, dtype=torch.uint8, device=device)
    assert tier.read(make_ids(*held), again).all()
    assert again[:, -1].tolist() == held
    assert len(tier) <= 4


def test_closing_waits_for_the_copies(device: torch.device) -> None:
    tier = PinnedTier(slot_bytes=MIB, capacity=MIB, device=device)
    tier.write(make_ids(1), rows(1))
    out = torch.zeros(1, MIB, dtype=torch.uint8, device=device)
    with torch.cuda.stream(busy()) as _:
        assert tier.read(make_ids(1), out).all()
    tier.close()
    torch.cuda.synchronize()
    assert int(out[0, -1]) == 1


def test_threads_on_streams_of_their_own(tier: SlabTier, device: torch.device) -> None:
    """Eight threads evict each other's blocks; what each reads is right."""
    made = rows(*range(16)).to(device)
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        random = Random(number)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(60):
                    ids = make_ids(*random.sample(range(16), 3))
                    if turn % 7 == number % 7:
                        torch.cuda._sleep(2_000_000)
                    tier.write(ids, made[torch.from_numpy(ids.astype(np.int64)).to(device)])
                    out = torch.full((3, MIB), 255, dtype=torch.uint8, device=device)
                    found = tier.read(ids, out)
                    for id, is_found, row in zip(ids.tolist(), found.tolist(), out.cpu(), strict=True):
                        assert bool((row == (id if is_found else 255)).all())
                    if turn % 5 == number % 5:
                        tier.discard(ids[:1])
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_page_locked_memory_is_exact(device: torch.device) -> None:
    """torch would lock a power of two: 512 MiB for these 300."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    with PinnedTier(slot_bytes=3 * MIB, capacity=301 * MIB, device=device) as tier:
        grown = (int(Path("/proc/self/statm").read_text().split()[1]) - pages) * 4096
        assert tier.capacity == 300 * MIB
        assert tier._slab is not None
        assert tier._slab.is_pinned()
        assert tier._slab.untyped_storage().nbytes() == 300 * MIB
        assert grown < 400 * MIB


def test_more_page_locked_memory_than_there_is_is_one_clear_line(device: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"^tier pinned: no \d+ bytes to lock on cpu: ") as caught:
        PinnedTier(slot_bytes=MIB, capacity=1 << 58, device=device)
    assert "\n" not in str(caught.value)
    torch.zeros(3, device=device).add_(1).cpu()  # the device goes on


def test_the_named_device_is_the_automatic_one(device: torch.device) -> None:
    assert resolve("auto") == resolve("cuda") == resolve(f"cuda:{device.index}") == device


def test_tiers_of_a_configuration_lie_on_its_device(device: torch.device) -> None:
    given = {"bank": "bank", "embedder": {"path": "given"}}
    tiers = [{"kind": "gpu", "capacity": "1MiB"}, {"kind": "pinned", "capacity": "1MiB"}, {"kind": "lmdb"}]
    for name in ("auto", "cuda", f"cuda:{device.index}"):
        config = Config.model_validate({**given, "model": {"path": "given", "device": name}, "tiers": tiers})
        opened = open_tiers(config, SLOT_BYTES, resolve(name))
        assert [tier.device for tier in opened] == [device, torch.device("cpu")]
        for tier in opened:
            tier.close()
    tiers[0]["device"] = "cpu"
    with pytest.raises(ConfigError, match="but the runtime computes on cuda:"):
        open_tiers(Config.model_validate({**given, "model": {"path": "given"}, "tiers": tiers}), SLOT_BYTES, device)
    assert [tier.kind for tier in default_tiers(device)] == ["gpu", "pinned", "lmdb"]


def test_a_hierarchy_does_not_wait_for_the_stream_it_reads_on(tmp_path: Path, device: torch.device) -> None:
    """From the home, from page-locked memory and from the device, in the order of the stream."""
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(12)))
        tiers = [kind(slot_bytes=SLOT_BYTES, capacity=20 * SLOT_BYTES, device=device) for kind in KINDS]
        hierarchy = Hierarchy(tiers, home, STAMP, device)
        ids = make_ids(*range(12))
        outs = [torch.zeros((12, SLOT_BYTES), dtype=torch.uint8, device=device) for _ in range(3)]
        torch.cuda.synchronize()
        stream = busy()
        began = time.perf_counter()
        with torch.cuda.stream(stream):
            assert hierarchy.read(ids, outs[0]).all()
            assert hierarchy.read(ids, outs[1]).all()
            tiers[0].discard(ids)
            assert hierarchy.read(ids, outs[2]).all()
            assert not stream.query(), f"{time.perf_counter() - began:.3f} s"
        stream.synchronize()
        made = make_blocks(ids)
        assert all(same_block(row, block) for out in outs for row, block in zip(out, made, strict=True))
        assert [stats.hits for stats in hierarchy.stats()] == [12, 12, 12]
        hierarchy.close()
