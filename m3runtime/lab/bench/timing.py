"""`timed` and `turns`: measure contenders that take turns."""

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
    """The spread of every contender's seconds; see `timed`."""
    return {name: Spread.of(found) for name, found in timed(contenders, rounds, progress).items()}


def timed(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], None] | None = None,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """The seconds of every contender in each round, after one round that does not count; see `turns`.

    ``before`` maps a contender to a function that is called before its turn, untimed. The time includes the work that a
    contender started on an accelerator.
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
    """Yield the round and the contender of each turn; round 0 is for warming up.

    Contenders alternate, so that changes of the machine's load affect all alike. The order is drawn anew in each round.
    A pause comes before each turn, because threads of the previous contender may spin for a while. ``progress`` is
    called with the number of each round when it begins.
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
    """Wait until the accelerator is idle, if anything ran on one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on ``count`` threads during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
