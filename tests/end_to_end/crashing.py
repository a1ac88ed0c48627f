"""A home whose process dies: at a transaction that a test chooses, before or after it is made."""

from collections.abc import Callable
from typing import Any, ClassVar

from m3backends.lmdb.home import LmdbHome


class Crash(BaseException):
    """The process is dead. Nothing that handles errors may handle it."""


class CrashingHome(LmdbHome):
    """An LMDB home. ``left`` is the number of transactions until it dies, for all homes of this process."""

    left: ClassVar[float] = float("inf")
    after: ClassVar[bool] = False
    """Is the last transaction made?"""

    def _transaction(self, make: Callable[..., Any], *given: Any, **named: Any) -> Any:
        CrashingHome.left -= 1
        if CrashingHome.left > 0:
            return make(*given, **named)
        if CrashingHome.left == 0 and self.after:
            make(*given, **named)
        raise Crash

    def commit(self, *given: Any, **named: Any) -> None:
        self._transaction(super().commit, *given, **named)

    def catalogue(self, *given: Any, **named: Any) -> None:
        self._transaction(super().catalogue, *given, **named)

    def change(self, *given: Any, **named: Any) -> None:
        self._transaction(super().change, *given, **named)

    def fill(self, *given: Any, **named: Any) -> Any:
        return self._transaction(super().fill, *given, **named)

    def set_meta(self, *given: Any, **named: Any) -> None:
        self._transaction(super().set_meta, *given, **named)
