"""`draw_losses`: the losses of a training over its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from m3runtime.storage.files import write_atomically


def draw_losses(stages: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw the losses of all stages, one after the other, into a picture; its suffix selects the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axes = figure.add_subplot()
    begun = 0
    for name, losses in stages.items():
        axes.plot([begun + step for step, _ in losses], [loss for _, loss in losses], lw=1, label=name)
        begun += losses[-1][0] if losses else 0
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats a token")
    axes.grid(lw=0.4)
    axes.legend(frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:] or "png", dpi=150))
