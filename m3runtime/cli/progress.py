"""`progress_bars`: the progress of a command: bars on a terminal, and a line every so often elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

from m3runtime.cli.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress, Task

    from m3runtime.writing.writer import OnProgress

EVERY = 10.0
"""Seconds between two lines."""


@contextmanager
def progress_bars(*, shown: bool) -> Iterator["OnProgress"]:
    """A function to call with the title of a task, its steps done, and all its steps."""
    if shown and not sys.stderr.isatty():
        yield Lines(sys.stderr)
        return
    bar, tasks = _bar(shown=shown), dict[str, int]()
    with ExitStack() as showing:

        def progress(title: str, done: int, total: int) -> None:
            if not tasks:
                showing.enter_context(bar)  # not earlier: an unused bar leaves a blank line
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total, completed=done, begun_at=done)
            bar.update(tasks[title], completed=done)  # type: ignore[arg-type]

        yield progress


class Lines:
    """Writes a line about a title every `EVERY` seconds and at its end: steps done, rate, time that is left."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._title = ""
        self._began = self._last = clock()
        self._from = 0
        self._ended = False

    def __call__(self, title: str, done: int, total: int) -> None:
        """Report ``done`` of ``total`` steps."""
        now = self._clock()
        if title != self._title:
            self._title, self._began, self._from = title, now, done
            self._ended = False
        ends = done >= total and not self._ended
        if now - self._last < EVERY and not ends:
            return
        self._ended = self._ended or ends
        self._last = now
        rate = (done - self._from) / (now - self._began) if now > self._began else 0.0
        rest = f", {rate:.1f}/s" if rate else ""
        rest += f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        print(f"{title}: {done} of {total}{rest}", file=self._out, flush=True)


def _bar(*, shown: bool) -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps per second."""

        def render(self, task: "Task") -> Text:
            speed = task.finished_speed or task.speed
            if speed is None and task.elapsed:  # rich needs more than one step
                speed = (task.completed - task.fields["begun_at"]) / task.elapsed
            return Text(f"{speed:.1f}/s" if speed else "")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=console(err=True),
        disable=not shown,
    )
