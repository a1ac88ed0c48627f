"""Expiry: the last day on which a text is remembered. Days are dates in UTC, written ``2027-01-31``.

Written so, an earlier day is the lesser text.
"""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

EXPIRES = "expires"
"""The key of `Place.metadata` that has the last day of a place."""
_DURATION = re.compile("([0-9]{1,6})([dw])", re.ASCII)
_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def is_over(last_day: str, today: str) -> bool:
    """Has a last day passed? False without one (no text)."""
    return "" < last_day < today


def last_day_of(text: str) -> str:
    """The last whole day of a date or of a time, such as ``2027-01-31T12:00Z``, whose last day is the day before.

    A time without a zone is UTC. Raises `ValueError`.
    """
    try:
        if _DATE.fullmatch(text):
            return date.fromisoformat(text).isoformat()
        at = datetime.fromisoformat(text)
        utc = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        return (utc.date() - timedelta(days=1)).isoformat()
    except (ValueError, OverflowError):
        raise ValueError(f"must be a date such as 2027-01-31, not {text[:40]!r}") from None


@dataclass(frozen=True, slots=True)
class Expiry:
    """The expiry that sources get when they are written: a last day, a number of days, or never."""

    day: str = ""
    days: int | None = None
    """Days from the writing that reads the source."""

    @classmethod
    def parse(cls, text: str, today: str) -> "Expiry":
        """``2027-01-31``, ``90d``, ``12w`` or ``never``. Raises `ValueError`, also for a day that has passed."""
        if text == "never":
            return cls()
        try:
            if found := _DURATION.fullmatch(text):
                expiry = cls(days=int(found[1]) * {"d": 1, "w": 7}[found[2]])
                expiry.last_day(today)
                return expiry
            day = date.fromisoformat(text).isoformat()
        except (ValueError, OverflowError):
            raise ValueError(
                f"must be a date such as 2027-01-31, a time such as 90d or 12w, or never, not {text!r}"
            ) from None
        if is_over(day, today):
            raise ValueError(f"{day} has passed: it is {today} in UTC")
        return cls(day)

    def last_day(self, today: str, known: str = "") -> str:
        """The last day of a source that is written ``today``; no text if it has none.

        ``known`` is the last day of a source that did not change: a number of days makes it earlier, and never later.
        """
        if self.days is None:
            return self.day
        day = (date.fromisoformat(today) + timedelta(days=self.days)).isoformat()
        return earlier(known, day)


def earlier(one: str, other: str) -> str:
    """The earlier of two last days, of which no text is none."""
    return min(one or other, other or one)
