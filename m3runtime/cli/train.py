"""``m3 train``: train a model to read memories."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import ConfigError


def train(
    config: ConfigFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the losses of both stages, such as losses.png.")
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Train a model to read memories, as the section `train` of the configuration says.

    A warmup without memories comes first, then training with them. It can be stopped at any moment and run again: it
    resumes at its last checkpoint. torchrun starts it on several GPUs:
    torchrun --nproc-per-node 4 --no-python m3 train.
    """
    settings = configuration(config, set)
    from m3runtime.adapters.training import Trainer
    from m3runtime.plugins.loading import available, load, require

    if (name := settings.model.adapter) not in available("trainers"):
        raise ConfigError(f"model.adapter: {name} cannot train a model; there are {', '.join(available('trainers'))}")
    require("m3 train", "memory3")
    trainer: type[Trainer] = load("trainers", name)
    with progress_bars(shown=not json) as progress:
        report = trainer().train(settings, progress)
    if plot:
        from m3runtime.lab.evaluation.losses import draw_losses

        draw_losses({stage.name: stage.losses for stage in report.stages}, plot)
    if json:
        print_json(asdict(report))
        return
    for stage in report.stages:
        first, last = stage.losses[0][1], stage.losses[-1][1]
        say(f"{stage.name}: {stage.steps} steps, loss {first:.3f} to {last:.3f}: {stage.path}")
    say(
        f"{report.sequences} sequences of {report.tokens} tokens; "
        f"{100 * report.retrieving:.0f} % of chunks retrieved one of {report.references} references"
    )
