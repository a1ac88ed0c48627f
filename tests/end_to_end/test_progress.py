"""Where there is no terminal, progress is a line every so often."""

from io import StringIO

from m3runtime.cli.progress import Lines


def test_a_line_every_ten_seconds_and_at_the_end() -> None:
    now = 100.0
    out = StringIO()
    lines = Lines(out, lambda: now)
    for second in range(26):
        now = 100.0 + second
        lines("Writing memories", 2 * second, 60)
    now = 126.0
    lines("Updating the index", 1, 4)
    now = 131.0
    lines("Updating the index", 2, 4)
    now = 132.0
    lines("Updating the index", 4, 4)
    lines("Updating the index", 4, 4)
    assert out.getvalue().splitlines() == [
        "Writing memories: 20 of 60, 2.0/s, 20 s left",
        "Writing memories: 40 of 60, 2.0/s, 10 s left",
        "Updating the index: 2 of 4, 0.2/s, 10 s left",
        "Updating the index: 4 of 4, 0.5/s",
    ]
