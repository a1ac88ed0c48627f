"""`Plot` and `draw`: the pictures of a report, drawn by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m3runtime.lab.evaluation.statistics import Estimate
from m3runtime.storage.files import write_atomically


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one set of bars."""

    name: str
    values: tuple[Estimate, ...]
    x: tuple[float, ...] = ()
    """Positions of the values on the x axis; empty if the plot has labels."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Bars over ``labels``, or lines over numbers if there are no labels."""

    name: str
    """Name of the files, without suffix."""
    title: str
    y: str
    series: tuple[Series, ...]
    labels: tuple[str, ...] = ()
    x: str = ""


def draw(plot: Plot, folder: Path) -> None:
    """Write ``NAME.png`` and ``NAME.svg``; equal plots give equal files."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Random ids of SVG elements would make equal plots differ, as would a date.
    with mpl.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "none", "font.size": 9}):
        width = max(6.0, 0.45 * len(plot.labels) * max(1, len(plot.series)))
        figure = Figure(figsize=(min(width, 14.0), 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, series in enumerate(plot.series):
            heights = [estimate.value for estimate in series.values]
            error = _error(series.values)
            if plot.labels:
                share = 0.8 / len(plot.series)
                places = [i - 0.4 + share * (number + 0.5) for i in range(len(heights))]
                axes.bar(places, heights, share, yerr=error, capsize=2, label=series.name, error_kw={"lw": 0.8})
            else:
                axes.errorbar(series.x, heights, yerr=error, marker="o", ms=3, capsize=2, label=series.name)
        if plot.labels:
            slanted = sum(len(label) for label in plot.labels) > 70
            axes.set_xticks(
                range(len(plot.labels)), plot.labels, rotation=30 if slanted else 0, ha="right" if slanted else "center"
            )
        axes.set_title(plot.title)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        axes.grid(axis="y", lw=0.4)
        axes.set_axisbelow(True)
        if len(plot.series) > 1:
            axes.legend(frameon=False)
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            save = partial(figure.savefig, format=suffix, dpi=150, metadata=metadata)
            write_atomically(folder / f"{plot.name}.{suffix}", save)


def _error(values: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    # A percentile interval need not hold the value itself.
    return (
        [max(0.0, estimate.value - estimate.low) for estimate in values],
        [max(0.0, estimate.high - estimate.value) for estimate in values],
    )
