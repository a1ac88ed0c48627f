"""`stages`: progress bars, one for each stage of a command."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, Task

    from m3runtime.writing.writer import OnProgress


@contextmanager
def stages(*, shown: bool) -> Iterator["OnProgress"]:
    """A function to call with a stage's title, its steps done, and all its steps."""
    bar, tasks = _bar(shown=shown), dict[str, int]()
    with ExitStack() as showing:

        def progress(stage: str, done: int, total: int) -> None:
            if not tasks:
                showing.enter_context(bar)  # not earlier: an unused bar leaves a blank line
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, completed=done, begun_at=done)
            bar.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        yield progress


def _bar(*, shown: bool) -> "Progress":
    from rich.console import Console
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
        console=Console(stderr=True),
        disable=not shown,
    )
