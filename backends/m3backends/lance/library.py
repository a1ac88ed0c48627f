"""The library pylance: its loading, and its errors as ours."""

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("LANCE_LOG", "error")  # read at the import: below that it tells of each new table
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lance
from lance.commit import CommitConflictError

from m3runtime.errors import BankFullError, M3Error, TierError

__all__ = ["FAULTS", "faults", "is_conflict", "lance", "reason"]

_FULL = re.compile(r"No space left|os error (28|122)\b|quota exceeded", re.IGNORECASE)
FAULTS = (CommitConflictError, OSError, ValueError, RuntimeError, NotImplementedError)
"""The errors that the library raises."""


@contextmanager
def faults(where: str) -> Iterator[None]:
    """Raise errors of the library as `TierError`, or `BankFullError` for a full drive. ``where`` names the bank."""
    try:
        yield
    except M3Error:
        raise
    except FAULTS as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            raise BankFullError(f"bank {where} is full: its drive has no room left") from error
        raise TierError(f"bank {where}: {reason(error)}") from error


def is_conflict(error: Exception) -> bool:
    """Was a commit refused because another came first? Compaction says so by an `OSError`."""
    return isinstance(error, CommitConflictError) or "commit conflict" in str(error)


def reason(error: Exception) -> str:
    """The message of an error of the library as one line, without the places in the library's own source."""
    text = re.sub(r",? /[^ ,]*/rust/[^ ,]*", "", " ".join(str(error).split()))
    return text[:300] or type(error).__name__
