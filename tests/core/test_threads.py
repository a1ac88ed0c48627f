import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from m3runtime.device.threads import compute_on, release, turn
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


def tasks() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted by /proc")
def test_who_has_computed_gives_its_helpers_back_and_computes_again() -> None:
    """Libgomp lets helpers spin for the next operation only while there are no more of them than cores."""
    x = torch.arange(1_000_000, dtype=torch.float32)

    def work() -> bool:
        compute_on(2)
        before = tasks()
        first, new = x.sqrt().sum(), tasks() - before  # other threads may have come as well
        release()
        until = time.monotonic() + 10
        while new <= tasks():
            assert time.monotonic() < until, "no helper has ended"
            time.sleep(0.01)
        return bool(x.sqrt().sum() == first)

    assert in_thread(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_waits_for_no_helper_of_its_parent() -> None:
    def work() -> int:
        compute_on(2)
        torch.arange(1_000_000, dtype=torch.float32).sqrt()
        child = os.fork()
        if not child:
            release()
            os._exit(7)
        until = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                os.kill(child, 9)
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])

    assert in_thread(work) == 7


def most_at_once(device: torch.device, threads: int) -> int:
    """How many threads were in their turns at the same time."""
    inside, most, lock = 0, 0, threading.Lock()
    meet = threading.Barrier(threads)

    def work(number: int) -> None:
        nonlocal inside, most
        for _ in range(10):
            meet.wait(10)
            with turn(device, keep=bool(number % 2)):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.005)
                with lock:
                    inside -= 1

    together(threads, work)
    return most


def test_turns_on_a_cpu_come_one_after_the_other_and_elsewhere_together() -> None:
    assert most_at_once(torch.device("cpu"), 3) == 1
    assert most_at_once(torch.device("meta"), 3) > 1


def test_an_error_ends_a_turn() -> None:
    with pytest.raises(ValueError, match="mine"), turn(torch.device("cpu")):
        raise ValueError("mine")
    with turn(torch.device("cpu")):
        pass
