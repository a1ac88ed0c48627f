import threading
from collections.abc import Callable

import torch

from m3runtime.device.threads import compute_on
from m3runtime.testing.threads import together


def in_thread(work: Callable[[], int]) -> int:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


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
