"""`Guard`: what an interrupt leaves behind."""

import sys
import threading
from types import FrameType

import pytest

from m3backends.guard import Guard


def entered(guard: Guard, moment: int) -> int:
    """Enter and leave, interrupted at a call by Python's own count; returns the number of calls."""
    calls = 0

    def watch(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"
        if event == "call" and calls == moment:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        with guard.shared():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return calls


def test_an_interrupt_at_any_call_leaves_nobody_inside() -> None:
    for moment in range(1, entered(Guard("closed"), 0) + 1):
        guard, done = Guard("closed"), threading.Event()
        entered(guard, moment)

        def alone(guard: Guard = guard, done: threading.Event = done) -> None:
            with guard.alone():
                done.set()

        threading.Thread(target=alone, daemon=True).start()
        assert done.wait(10), f"interrupted at call {moment}"


@pytest.mark.parametrize("way", ["shared", "alone"])
def test_a_thread_that_was_interrupted_may_enter_again_while_it_cleans_up(way: str) -> None:
    """At any call or return: the interrupt is still being handled, and keeps alive what it met."""

    def interrupted(guard: Guard, moment: int) -> int:
        events = 0

        def watch(_: FrameType, event: str, __: object) -> None:
            nonlocal events
            events += event in ("call", "return")
            if event in ("call", "return") and events == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(watch)
        try:
            with getattr(guard, way)():
                pass
        except KeyboardInterrupt:  # its traceback holds the frames that it came through
            with guard.shared():
                pass
            with guard.alone():
                pass
        finally:
            sys.setprofile(None)
        return events

    for moment in range(1, interrupted(Guard("closed"), 0) + 1):
        guard = Guard("closed")
        thread = threading.Thread(target=interrupted, args=(guard, moment), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), f"interrupted at event {moment}"
