"""Times of contenders that take turns."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from m3runtime.lab.results import Spread

_PAUSE = 0.02


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, progress: Callable[[int], None] | None = None
) -> dict[str, Spread]:
    """Time every contender once in each round, after one round that does not count; see `timed`."""
    return {name: Spread.of(found) for name, found in timed(contenders, rounds, progress).items()}


def timed(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], None] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in each round; see `turns`.

    ``before`` is what to do before a contender's turn, untimed. What a contender starts on an accelerator is waited
    for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number, name in turns(list(contenders), rounds, progress, before):
        began = time.perf_counter()
        contenders[name]()
        wait()
        if number:
            seconds[name].append(time.perf_counter() - began)
    return seconds


def turns(
    names: Sequence[str],
    rounds: int,
    progress: Callable[[int], None] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> Iterator[tuple[int, str]]:
    """Whose turn it is, and in which round; round 0 is for warming up.

    Whatever else the machine does then falls on all of them alike. The order is another one in each round, and before
    each turn there is a pause: the threads of the one before may go on spinning for a while. ``progress`` is called
    with each round's number when it begins.
    """
    order, drawing = list(names), random.Random(0)
    for number in range(rounds + 1):
        if progress:
            progress(number)
        drawing.shuffle(order)
        for name in order:
            if before and name in before:
                before[name]()
            wait()
            time.sleep(_PAUSE)
            yield number, name


def wait() -> None:
    """Until the accelerator is idle, if anything ran on one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
