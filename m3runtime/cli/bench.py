"""``m3 bench``: speed, errors and hit rates, each against a baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli import bench_recall, bench_speed, bench_write
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json, show_size
from m3runtime.cli.progress import stages
from m3runtime.errors import InputError

if TYPE_CHECKING:
    from m3runtime.lab.bench.codec import CodecBench
    from m3runtime.lab.bench.eviction import EvictionBench

app = typer.Typer(
    name="bench", help="Measure speed, errors and hit rates against a baseline in the same run.", no_args_is_help=True
)

_STAGES = {
    "memories": "Computing memories",
    "errors": "Measuring errors",
    "codec": "Training the codec",
    "decoding": "Measuring times",
}
"""Names of stages for progress bars."""

app.command("decode")(bench_speed.decode)
app.command("tiers")(bench_speed.tiers)
app.command("recall")(bench_recall.recall)
app.command("write")(bench_write.write)


@app.command()
def codec(
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", help="Texts to encode; may be repeated. Default: the references of the bank."),
    ] = None,
    config: ConfigFile = None,
    references: Annotated[int, typer.Option(min=16, help="Number of references.")] = 128,
    decoded: Annotated[int, typer.Option(min=1, help="Memories decoded in one call.")] = 5,
    layers: Annotated[int, typer.Option(min=0, help="Layers whose squared errors are measured; 0: none.")] = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Timed rounds; all contenders take turns in each.")] = 15,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: the default of torch.")] = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Measure squared error, decoding speed and size of codecs against faiss.

    Everything is measured in one run, on the same vectors and threads; errors are compared at equal bytes. The bank is
    not changed.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 bench codec", "train")
    import torch

    from m3runtime.lab.bench.banks import reference_texts
    from m3runtime.lab.bench.codec import BenchSettings, bench_codec

    asked = BenchSettings(references, decoded, layers, rounds, threads or torch.get_num_threads())
    adapter = assembly.open_adapter(settings)
    with stages(_STAGES, shown=not json) as progress:
        found = bench_codec(settings, adapter, reference_texts(settings, adapter, corpus or []), asked, progress)
    if json:
        print_json(found.to_json())
    else:
        _show(found)


@app.command()
def eviction(
    trace: Annotated[Path, typer.Option("--trace", help="A trace that `recall.trace` recorded.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Capacity of the tier, such as 2GiB; may be repeated. Default: a quarter, once and four times that of "
            "the fastest tier.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of a policy; may be repeated. Default: all.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure hit rates of eviction policies on a recorded trace against the optimum (Belady's MIN).

    Nothing is timed: the same trace gives the same figures.
    """
    from m3runtime.config.units import parse_size
    from m3runtime.lab.bench.eviction import bench_eviction
    from m3runtime.storage.eviction import POLICIES

    try:
        capacities = [parse_size(size) for size in capacity or ()]
    except ValueError as error:
        raise InputError(f"--capacity {error}") from None
    found = bench_eviction(trace, list(dict.fromkeys(policy or POLICIES)), capacities)
    if json:
        print_json(found.to_json())
    else:
        _show_eviction(found)


def _show(found: "CodecBench") -> None:
    from rich.console import Console
    from rich.table import Table

    from m3runtime.lab.bench.codec import ratios, speedups

    console = Console()
    error = Table("bytes of a vector", "codec", "keys", "values", "both", title="Relative squared error, held out")
    for size, rows in found.errors.items():
        for row in rows:
            error.add_row(f"{row.bytes:.1f}", row.codec, f"{row.keys:.4f}", f"{row.values:.4f}", f"{row.both:.4f}")
        for name, ratio in ratios(rows):
            error.add_row(str(size), f"{name}: over the best of faiss", "", "", f"{ratio:.3f}", end_section=True)
    if found.errors:
        console.print(error)
    speed = found.speed
    title = f"Decoding {speed.memories} memories, {speed.tokens} tokens"
    times = Table("", "median (quartiles)", "of the copy", title=title)
    for name, spread in speed.times.items():
        times.add_row(name, str(spread), f"{spread.median / speed.limit(name):.1f}")
    console.print(times)
    for name, ratio in speedups(speed).items():
        console.print(f"{name}: {ratio:.2f}")
    console.print(f"{show_size(speed.bytes)} written, on {found.device}, {found.settings.threads} threads")
    rest = Table("codec", "bytes a memory", "with zstd", "of it", title="At rest")
    for one in found.at_rest:
        rest.add_row(one.codec, f"{one.bytes:,.0f}", f"{one.zstd:,.0f}", f"{one.zstd / one.bytes:.3f}")
    console.print(rest)


def _show_eviction(found: "EvictionBench") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("capacity", "blocks", "policy", "hit rate", "lifted", "bytes", title="One tier before slower ones")
    for row, following in zip(found.rows, [*found.rows[1:], None], strict=True):
        table.add_row(
            show_size(row.slots * found.slot_bytes),
            f"{row.slots:,}",
            row.policy,
            f"{row.hit_rate:.3f}",
            f"{row.brought_up:,}",
            show_size(row.brought_up * found.slot_bytes),
            end_section=following is None or following.slots != row.slots,
        )
    console = Console()
    console.print(table)
    console.print(f"{found.requests:,} requests of {found.blocks:,} blocks; runs: {found.runs}; {found.trace}")
