"""Ctrl-C is answered wherever it lands, even where Python cannot raise."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SOON = 0.01
"""Seconds after which an interrupt that was lost comes again: what lost it has long returned by then."""


@contextmanager
def heard() -> Iterator[None]:
    """Let an interrupt that Python could not raise come again, until one is raised.

    A `KeyboardInterrupt` in a finaliser (``__del__``, the callback of a weak reference) is reported and dropped, and
    the command would go on as if nobody had interrupted it. Libraries have many finalisers: one that compiles with LLVM
    spends much of its time in them. For the main thread; `sys.unraisablehook` is what it was when the block ends.
    """
    before, ended, main = sys.unraisablehook, False, threading.main_thread().ident
    assert main is not None

    def come_again() -> None:
        time.sleep(_SOON)
        if not ended:
            signal.pthread_kill(main, signal.SIGINT)  # a true one: it also wakes what waits

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            # `Thread.start` takes locks that the code which was interrupted may hold.
            _thread.start_new_thread(come_again, ())
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        ended = True
        sys.unraisablehook = before
