"""Times of contenders that take turns."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of some rounds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.2f} ms ({1e3 * self.low:.2f} to {1e3 * self.high:.2f})"


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, progress: Callable[[int], None] | None = None
) -> dict[str, Spread]:
    """Time every contender once in each round, after one round that does not count.

    Whatever else the machine does then falls on all of them alike. The order is another one in each round, and before
    each there is a pause: the threads of the one before may go on spinning for a while. What a contender starts on an
    accelerator is waited for.
    """
    order, drawing = list(contenders), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        if progress:
            progress(number)
        drawing.shuffle(order)
        for name in order:
            wait()
            time.sleep(_PAUSE)
            began = time.perf_counter()
            contenders[name]()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: _spread(found) for name, found in seconds.items()}


def wait() -> None:
    """Until the accelerator is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _spread(seconds: list[float]) -> Spread:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high), len(seconds))
