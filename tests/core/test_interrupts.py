"""An interrupt (Ctrl-C) at any moment of a recall: the next ones are served, and nothing is left over."""

import gc
import sys
import threading
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

from m3runtime.recall.recalled import Recalled
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from tests.core.recalling import PART_BYTES, TEXTS, open_runtime

ROOMS = ("recall", "retrieval", "storage")
TEXT = "lamp oil harbour"


class Interrupt:
    """Raises `KeyboardInterrupt` in its thread at the ``moment``-th call, or return from C, in code of `ROOMS`.

    Python handles a signal at these moments, and at the end of a loop's turn, and at no others.
    """

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or Path(code.co_filename).parent.name not in ROOMS:
            return
        if code.co_name in ("__del__", "<genexpr>"):  # Python prints what is raised here, and goes on
            return
        self.left -= 1
        if not self.left:
            sys.setprofile(None)
            raise KeyboardInterrupt


def interrupted(stream: Stream, moment: int, *, hinted: bool) -> bool:
    """Recall, and be interrupted then; False if the recall ended before."""
    sys.setprofile(Interrupt(moment))
    try:
        if hinted:
            stream.hint("winter island")
        stream.recall(TEXT)
        stream.close()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def recalled(runtime: Runtime) -> Recalled:
    """Recall in another thread, so that a recall that hangs fails the test."""
    results: list[Recalled] = []

    def recall() -> None:
        with runtime.stream() as stream:
            results.append(stream.recall(TEXT, wait=True))

    thread = threading.Thread(target=recall, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive(), "it hangs"
    return results[0]


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("when_late", "hinted"), [("wait", False), ("skip", True)])
def test_an_interrupt_at_any_moment_harms_no_later_recall(
    when_late: str, hinted: bool, step: int, tmp_path: Path
) -> None:
    with open_runtime(tmp_path / "bank", when_late=when_late, deadline=60.0, decoded=6 * PART_BYTES) as runtime:
        for moment in count(1, step):
            runtime.store.forget(range(len(TEXTS)))
            runtime.retriever.clear()
            with runtime.stream() as before:
                before.recall("market bridge", wait=True)  # evicted later
                before.recall("winter island", wait=True)
                stream = runtime.stream()
                goes_on = interrupted(stream, moment, hinted=hinted)
                del stream
            gc.collect()
            assert len(recalled(runtime)) == 3, moment
            assert runtime.background.drain(timeout=60)
            stored = runtime.metrics().store
            assert (stored.leased, stored.guessed) == (0, 0), moment
            runtime.store.check_integrity()
            if not goes_on:
                break
    assert moment > 100
