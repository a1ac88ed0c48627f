"""`heard`: repeat a Ctrl-C that came where Python cannot raise."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SOON = 0.01
"""Seconds until a lost interrupt is repeated; the finaliser that lost it has returned by then."""


@contextmanager
def heard() -> Iterator[None]:
    """Repeat an interrupt that Python could not raise, until one is raised.

    A `KeyboardInterrupt` in a finaliser (``__del__``, the callback of a weak reference) is reported and dropped, and
    the command would continue. Libraries have many finalisers: one that compiles with LLVM spends much of its time in
    them. Call it in the main thread. `sys.unraisablehook` is restored at the end of the block.
    """
    before, ended, main = sys.unraisablehook, False, threading.main_thread().ident
    assert main is not None

    def come_again() -> None:
        time.sleep(_SOON)
        if not ended:
            signal.pthread_kill(main, signal.SIGINT)  # a real signal also ends a wait

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            # `Thread.start` takes locks that the interrupted code may hold.
            _thread.start_new_thread(come_again, ())
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        ended = True
        sys.unraisablehook = before
