"""`follow`: keeps a bank in step with folders while their files change."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m3runtime.errors import BankBusyError, InputError
from m3runtime.plugins.loading import require
from m3runtime.writing.mirror import Mirror, MirrorReport

if TYPE_CHECKING:
    from watchfiles import Change

_PATIENCE = 5.0
"""Seconds until a pass that another process or a bad file prevented is tried again."""


def follow(mirror: Mirror, folders: Sequence[Path]) -> Iterator[MirrorReport | BankBusyError | InputError]:
    """Bring the bank in step with folders, now and whenever a file in them changes, until the caller stops.

    At the end of each day in UTC it forgets what has expired. Gives the report of each pass that changed something or
    found other files that cannot be read, or the error that prevented one; both once, and the files are tried again.
    The bank is open only during a pass, so that others can write between two. All state is in the bank: a process that
    was killed is followed by one that begins anew. Raises `PluginError` if watchfiles is not installed, `InputError`
    for a path that is no folder, and what `Mirror.write` raises.
    """
    require("m3 sync --watch", "sync")
    from watchfiles import watch

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; only folders are followed")
    bank = mirror.config.bank.resolve()

    def is_outside(_: "Change", path: str) -> bool:
        return not Path(path).resolve().is_relative_to(bank)

    changes = watch(*folders, watch_filter=is_outside, rust_timeout=int(_PATIENCE * 1000), yield_on_timeout=True)
    said = day = ""
    passes = 2  # a change before the watch began shows in the second one
    while True:
        if passes:
            passes -= 1
            day = mirror.today()
            try:
                report = mirror.write(folders)
            except (BankBusyError, InputError) as error:
                passes = max(passes, 1)
                if str(error) != said:
                    yield error
                said = str(error)
            else:
                unread = str(dict(report.survey.unread)) if report.survey.unread else ""
                if not report.survey.is_in_step or report.expired or unread not in ("", said):
                    yield report
                said, passes = unread, max(passes, int(bool(unread)))
        has_changed = bool(next(changes))
        passes = 1 if has_changed or mirror.today() != day else passes  # at the end of a day something may expire
