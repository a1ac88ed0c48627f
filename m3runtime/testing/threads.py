"""Threads that get into each other's way."""

import sys
import threading
import time
from collections.abc import Callable
from random import Random
from types import FrameType
from typing import Any


def together(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` in threads that start at once; raise what any of them raised.

    Between any two lines of Python a thread may stop and let others go on, much more often than Python by itself
    would switch: a race that shows once in a million calls shows here in every run.
    """
    start, errors = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        start.wait()
        before = sys.gettrace()
        sys.settrace(_stops(number))
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        finally:
            sys.settrace(before)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def _stops(seed: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that sleeps for an instant after every thirtieth line or so."""
    random = Random(seed)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:  # noqa: ARG001
        if event == "line" and random.random() < 1 / 30:
            time.sleep(1e-6)
        return trace

    return trace
