"""``m3 bench write``: the speed of writing memories against the speed of the model alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json
from m3runtime.cli.progress import stages

if TYPE_CHECKING:
    from m3runtime.lab.bench.write import WriteBench


def write(
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus", help="Texts to take references from; may be repeated. Default: the references of the bank."
        ),
    ] = None,
    config: ConfigFile = None,
    references: Annotated[int, typer.Option(min=1, help="Most references to write.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; all contenders take turns in each.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: the default of torch.")] = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare writing memories with the model alone reading the same references in batches of the same size.

    They are written into a temporary bank next to the configured one, which is not changed. Training the codec is not
    timed.
    """
    settings = configuration(config, set)
    import torch

    from m3runtime import assembly
    from m3runtime.lab.bench.write import WriteSettings, bench_write

    asked = WriteSettings(references, rounds, threads or torch.get_num_threads())
    adapter = assembly.open_adapter(settings)
    names = {"codec": "Training the codec", "writing": "Measuring times"}
    with stages(names, shown=not json) as progress:
        found = bench_write(settings, adapter, corpus or [], asked, progress)
    if json:
        print_json(found.to_json())
    else:
        _show(found)


def _show(found: "WriteBench") -> None:
    from rich.console import Console
    from rich.table import Table

    from m3runtime.lab.bench.write import WRITE

    title = f"{found.settings.references} references of {found.tokens} tokens, {found.batch} at once"
    times = Table("", "seconds (quartiles)", "tokens/s", "kept by the write", title=title)
    for name, spread in found.seconds.items():
        kept = "" if name == WRITE else found.kept[name].show(3)
        times.add_row(name, spread.show(2), f"{found.tokens / spread.median:,.0f}", kept)
    shares = Table("stage", "of the whole write", title="Where the time goes")
    for stage, spread in found.shares.items():
        shares.add_row(stage, spread.show(3))
    console = Console()
    console.print(times)
    console.print(shares)
    how = "in parallel with the model" if found.overlapping else "in turn with the model"
    console.print(
        f"encoding and embedding {how}; {found.model}, {found.dtype} on {found.device}, "
        f"{found.settings.threads} threads; batch {found.batch}"
    )
