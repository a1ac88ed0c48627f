"""Last days: what is written, and what it means."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.documents.expiry import Expiry, earlier, is_over, last_day_of
from m3runtime.documents.reference import Place, Reference

TODAY = "2026-11-27"
DAYS = st.dates(date(2000, 1, 1), date(2100, 1, 1)).map(date.isoformat)


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2027-01-31", "2027-01-31"),
        ("2027-01-31T12:00:00Z", "2027-01-30"),  # all of that day's last hours would be too late
        ("2027-01-31T00:00", "2027-01-30"),
        ("2027-01-31T23:30:00-02:00", "2027-01-31"),
        ("2027-01-31T00:30:00+02:00", "2027-01-29"),
    ],
)
def test_the_last_whole_day(text: str, day: str) -> None:
    assert last_day_of(text) == day


@pytest.mark.parametrize(
    "text", ["", "soon", "2027-02-30", "31.01.2027", "1800000000", "0001-01-01T00:00", "\u0662027-01-31"]
)
def test_what_is_no_day(text: str) -> None:
    with pytest.raises(ValueError, match="must be a date such as 2027-01-31"):
        last_day_of(text)


@given(last=DAYS, today=DAYS)
def test_a_day_is_over_when_the_next_has_begun(last: str, today: str) -> None:
    assert is_over(last, today) == (date.fromisoformat(last) < date.fromisoformat(today))
    assert not is_over("", today)
    assert earlier(last, today) == min(last, today)
    assert earlier(last, "") == earlier("", last) == last


@pytest.mark.parametrize(
    ("text", "expiry"),
    [
        ("2027-01-31", Expiry("2027-01-31")),
        (TODAY, Expiry(TODAY)),
        ("90d", Expiry(days=90)),
        ("2w", Expiry(days=14)),
        ("0d", Expiry(days=0)),
        ("never", Expiry()),
    ],
)
def test_what_a_command_takes(text: str, expiry: Expiry) -> None:
    assert Expiry.parse(text, TODAY) == expiry


@pytest.mark.parametrize("text", ["", "90", "-1d", "1m", "999999d9", "soon", "999999w", "2026-11-26", "2027-13-01"])
def test_what_a_command_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a date such as|has passed: it is 2026-11-27 in UTC"):
        Expiry.parse(text, TODAY)


@given(known=DAYS | st.just(""), today=DAYS, days=st.integers(0, 4000), later=st.integers(0, 4000))
def test_a_duration_never_lengthens_a_life(known: str, today: str, days: int, later: int) -> None:
    first = Expiry(days=days).last_day(today, known)
    assert first <= known or not known
    day = (date.fromisoformat(today) + timedelta(later)).isoformat()
    assert Expiry(days=days).last_day(day, first) == first  # written again, unchanged
    assert Expiry("2030-01-01").last_day(today, known) == "2030-01-01"
    assert Expiry().last_day(today, known) == ""


def test_a_reference_lives_as_long_as_any_of_its_places() -> None:
    early, late, ever = (
        Place(name, 0, 1, {"expires": day} if day else {})
        for name, day in zip("abc", ("2026-01-01", "2027-01-01", ""), strict=True)
    )
    for places, today, living in [
        ((early, late), "2026-01-01", (early, late)),
        ((early, late), "2026-01-02", (late,)),
        ((early, late), "2027-01-02", ()),
        ((early, ever), "2099-01-01", (ever,)),
    ]:
        assert Reference("x", 1, "", places).living(today) == living
