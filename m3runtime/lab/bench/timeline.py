"""`draw_timeline`: a picture of one run, with chunks, recalls, and the work in parallel with decoding."""

from collections.abc import Sequence
from pathlib import Path

from m3runtime.observe.metrics import Event

ROWS = {
    "chunk": "decoding",
    "recall": "recall",
    "embed": "embedding",
    "search": "search",
    "wait": "waiting",
    "read": "reading",
    "decode": "decoding memories",
    "deliver": "delivering",
    "ahead.embed": "ahead: embedding",
    "ahead.search": "ahead: search",
    "ahead.read": "ahead: lift, reading",
    "ahead.lift": "ahead: lift only",
    "ahead.decode": "ahead: decoding memories",
}
"""Rows of the picture from the top, by name of the event; other events are parts of these."""
_LEAST = 0.0015
"""Least width of an event, as a share of the picture; most events are too short to be seen."""


def draw_timeline(events: Sequence[Event], path: Path) -> None:
    """Draw events into ``path``, whose suffix selects the format. Times are seconds from the begin of the run.

    Needs matplotlib, from the extra ``eval``. Raises `OSError` if the file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = [name for name in ROWS if any(event.name == name for event in events)]
    end = max((event.end for event in events), default=1.0)
    figure = Figure(figsize=(12.0, 0.9 + 0.32 * max(1, len(shown))), layout="constrained")
    axes = figure.add_subplot()
    chunks = sorted((event.start, event.end) for event in events if event.name == "chunk")
    for number, (start, stop) in enumerate(chunks):
        axes.axvspan(start, stop, color="0.95" if number % 2 else "0.9", lw=0)
    for row, name in enumerate(shown):
        bars = [(event.start, max(event.end - event.start, _LEAST * end)) for event in events if event.name == name]
        colour = "C2" if name == "chunk" else "C1" if name.startswith("ahead.") else "C0"
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, edgecolor="white" if name == "chunk" else "none")
    axes.set_yticks(range(len(shown)), [ROWS[name] for name in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds from the call")
    figure.savefig(path, dpi=150)
