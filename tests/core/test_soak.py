"""Many recalls by many threads, with hints, faults, forgetting and dropped streams in between: nothing is left over."""

import gc
import os
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest

from m3runtime.errors import M3Error
from m3runtime.observe.metrics import Metrics
from m3runtime.testing.faulty import Fault, FaultyHome, Schedule
from tests.core.recalling import PART_BYTES, TEXTS, WORDS, decoded_by, open_runtime, pinned

THREADS = 8
NOW = {"bytes", "parts", "leased", "guessed", "capacity", "last_error"}
"""Fields of the counters that say what is so now; all others only grow."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counters(metrics: Metrics) -> dict[str, Any]:
    """Every counter that only grows."""
    groups = {"recall": metrics.recall, "lookahead": metrics.lookahead, "store": metrics.store}
    groups |= {f"tier {tier.stats.name}": tier.stats for tier in metrics.tiers}
    return {
        f"{name}.{field.name}": getattr(group, field.name)
        for name, group in groups.items()
        for field in fields(group)
        if field.name not in NOW and field.name != "name"
    }


@pytest.mark.parametrize("recalls", [1_600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_recalls_of_many_threads_leave_nothing_behind(recalls: int, tmp_path: Path) -> None:
    schedule = Schedule(Fault("error", rate=0.01, methods={"read"}))
    runtime = open_runtime(
        tmp_path / "bank",
        tiers=pinned(4),
        wrap=lambda home: FaultyHome(home, schedule),
        when_late="next_chunk",
        deadline=0.002,
        decoded=4 * THREADS * 3 * PART_BYTES // 5,  # less than all streams would like
    )
    forgettable = list(range(len(TEXTS) // 2, len(TEXTS)))
    lock, done, before, sizes = threading.Lock(), [0], counters(runtime.metrics()), list[int]()

    def step(random: Random, streams: list[Any]) -> None:
        if not streams or random.random() < 0.05:
            streams.append(runtime.stream())
        stream = random.choice(streams)
        text = " ".join(random.choices(WORDS, k=2))
        if random.random() < 0.5:
            stream.hint(text if random.random() < 0.7 else random.choice(TEXTS))
        stream.recall(text, wait=random.choice([None, None, True]))
        if random.random() < 0.05:
            streams.remove(stream)
            if random.random() < 0.5:
                stream.close()  # the others are only dropped

    def work(number: int) -> None:
        random, streams = Random(number), list[Any]()
        while True:
            with lock:
                if done[0] >= recalls:
                    return
                done[0] += 1
                turn = done[0]
            with suppress(M3Error):  # a fault that was injected, or a store full of leases
                step(random, streams)
            if turn % (recalls // 8) == 0:
                with lock:
                    if forgettable:
                        runtime.forget([forgettable.pop()])
                    after = counters(runtime.metrics())
                    shrunk = [name for name, value in after.items() if value < before[name]]
                    assert not shrunk
                    before.update(after)
                    runtime.store.check_integrity()
                    gc.collect()
                    sizes.append(resident_bytes())

    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert runtime.background.drain(timeout=60)
    gc.collect()
    runtime.store.check_integrity()
    stored = runtime.metrics().store
    assert (stored.leased, stored.guessed) == (0, 0)
    assert 0 < stored.bytes <= stored.capacity
    assert runtime.metrics().recall.chunks > recalls // 2
    assert sizes[-1] - sizes[1] < 16 * 1024**2, "memory is flat"
    runtime.close()


def test_streams_that_share_memories_decode_each_once_within_the_bound(tmp_path: Path) -> None:
    """64 streams, 20 memories."""
    with open_runtime(tmp_path / "bank", memories=5, decoded=20 * PART_BYTES) as runtime:
        shared = set[int]()
        streams = [runtime.stream() for _ in range(64)]
        texts = [TEXTS[number % 20] for number in range(64)]
        for chosen in runtime.search(texts[:4]):
            shared.update(match.id for match in chosen)
        runtime.recall(streams, [texts[number % 4] for number in range(64)])
        assert len(decoded_by(runtime)) == runtime.metrics().store.decoded == len(shared) <= 20
        assert runtime.metrics().store.leased == len(shared)
        assert runtime.metrics().store.bytes <= 20 * PART_BYTES
        for stream in streams:
            stream.recall(texts[stream.number % 4])
        assert runtime.metrics().store.decoded == len(shared)
