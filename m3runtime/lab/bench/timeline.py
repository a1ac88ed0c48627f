"""A picture of one run: chunks, the recalls between them, and what is done beside decoding."""

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
"""What is drawn of a run, from the top on; events of other names are in these."""
_LEAST = 0.0015
"""Share of the width that an event takes at least: most are too short to be seen."""


def draw_timeline(events: Sequence[Event], path: Path) -> None:
    """Draw events, whose times are seconds from the run's begin, into ``path``; its suffix says in which format.

    The image is made with the package of the extra ``eval``. Raises `OSError` if it cannot be written.
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
