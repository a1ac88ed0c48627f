import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from m3runtime.device.threads import compute_on, release
from m3runtime.testing.threads import together


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def test_only_the_calling_thread_computes_on_fewer_or_more_threads() -> None:
    before = torch.get_num_threads()
    matrix = torch.randn(300, 300)
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        if number % 2:
            torch.nn.functional.gelu(matrix @ matrix)  # it may have computed before
        compute_on(number + 1)
        torch.nn.functional.gelu(matrix @ matrix)
        found[number] = [torch.get_num_threads()]

    together(4, work)
    assert found == {number: [number + 1] for number in range(4)}
    assert torch.get_num_threads() == before
    assert in_thread(torch.get_num_threads) == before


def helpers() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted by /proc")
def test_who_has_computed_gives_its_helpers_back_and_computes_again() -> None:
    """Libgomp lets helpers spin for the next operation only while there are no more of them than cores."""
    x = torch.arange(1_000_000, dtype=torch.float32)

    def work() -> bool:
        compute_on(2)
        first, busy = x.sqrt().sum(), helpers()
        release()
        until = time.monotonic() + 10
        while helpers() >= busy:
            assert time.monotonic() < until, "no helper has ended"
            time.sleep(0.01)
        return bool(x.sqrt().sum() == first)

    assert in_thread(work)
