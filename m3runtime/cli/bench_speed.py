"""``m3 bench decode`` and ``m3 bench tiers``: the cost of memories while decoding, and the speed of the tiers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json, show_size
from m3runtime.cli.progress import stages

if TYPE_CHECKING:
    from rich.console import Console

    from m3runtime.lab.bench.decode import BatchBench, DecodeBench
    from m3runtime.lab.bench.tiers import TierBench

Corpus = Annotated[
    list[Path] | None,
    typer.Option("--corpus", help="Texts for a temporary bank; may be repeated. Default: the configured bank."),
]
References = Annotated[int, typer.Option(min=1, help="Most references in a temporary bank.")]
_WRITING = {"codec": "Training the codec", "memories": "Writing memories"}
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: the default of torch.")]


def decode(
    corpus: Corpus = None,
    config: ConfigFile = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each sequence; no sequence ends early.")] = 256,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; may be repeated. Default: 1 and 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; all contenders take turns in each.")] = 7,
    memories: Annotated[int, typer.Option(min=1, help="Memories of each chunk.")] = 5,
    references: References = 128,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Compare only the baseline and decoding with memories, in a third of the time."),
    ] = False,
    threads: Threads = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the chunks and recalls of one run into a picture, such as run.png."),
    ] = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare decoding with memories to the model's own library without them.

    Throughput and the time to the first token are measured. Every chunk gets its memories, whatever its text is:
    recall.min_score and recall.margin are not applied.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    if plot:
        plugins.require("m3 bench decode --plot", "eval")
    import torch

    from m3runtime.lab.bench.decode import DecodeSettings, bench_decode

    sizes = tuple(dict.fromkeys(batch or (1, 8)))
    threads = threads or torch.get_num_threads()
    asked = DecodeSettings(new_tokens, sizes, rounds, memories, references, threads, quick=quick)
    adapter = assembly.open_adapter(settings)
    names = _WRITING | {f"baseline {size}": f"Choosing a baseline, batch {size}" for size in sizes}
    names |= {f"rounds {size}": f"Decoding, batch {size}" for size in sizes}
    with stages(names, shown=not json) as progress:
        found = bench_decode(settings, adapter, corpus or [], asked, plot, progress)
    if json:
        print_json(found.to_json())
    else:
        _show_decode(found)


def tiers(
    corpus: Corpus = None,
    config: ConfigFile = None,
    blocks: Annotated[
        list[int] | None, typer.Option(min=1, help="Blocks read in one call; may be repeated. Default: 1, 5 and 32.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; all contenders take turns in each.")] = 15,
    references: References = 64,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Compare each tier, and the whole path to keys and values, with plain reads, writes and copies of the same bytes.

    The bank is not changed. Temporary files are written to a folder next to it, on the same drive.
    """
    settings = configuration(config, set)
    import torch

    from m3runtime.lab.bench.tiers import BATCHES, TierSettings, bench_tiers

    sizes = tuple(dict.fromkeys(blocks or BATCHES))
    asked = TierSettings(sizes, rounds, references, threads or torch.get_num_threads())
    with stages({**_WRITING, "tiers": "Measuring times"}, shown=not json) as progress:
        found = bench_tiers(settings, corpus or [], asked, progress)
    if json:
        print_json(found.to_json())
    else:
        _show_tiers(found)


def _show_decode(found: "DecodeBench") -> None:
    from rich.console import Console

    from m3runtime.lab.results import environment

    console = Console()
    for batch in found.batches:
        _show_batch(console, batch)
    settings = found.settings
    console.print(
        f"{found.model}, {found.dtype}, on {found.device}; {settings.threads} threads; {settings.new_tokens} tokens "
        f"after {found.prompt_tokens}; {settings.rounds} rounds; bank: {found.bank}; {environment()['machine']}"
    )


def _show_batch(console: "Console", batch: "BatchBench") -> None:
    from rich.table import Table

    from m3runtime.lab.bench.decode_runs import MEMORIES, PLAIN

    table = Table("", "tokens/s", "kept", "first token, s", "of text's", title=f"Batch {batch.batch}")
    for name, one in batch.contenders.items():
        chosen = f" ({batch.chosen[name]})" if name in batch.chosen else ""
        table.add_row(
            name + chosen,
            one.tokens_per_s.show(1),
            "" if name == PLAIN else one.kept.show(3),
            one.first_token_s.show(3),
            one.first_token_of_text.show(3) if one.first_token_of_text else "",
        )
    console.print(table)
    bound, ends = batch.bound, batch.boundaries[MEMORIES]
    console.print(
        f"bytes allow {bound.kept:.3f}: {show_size(bound.weight_bytes)} of weights, "
        f"{batch.batch} x {show_size(bound.memory_bytes)} of memories ({bound.memory_tokens:.0f} tokens); "
        f"{batch.contenders[MEMORIES].kept.median / bound.kept:.3f} of that reached"
    )
    for name, each in batch.boundaries.items():
        console.print(
            f"{name}: recalls take {each.recalling:.2%} of decoding, of which {each.waited:.2%} is waiting; "
            f"{each.late} late in {each.chunks} chunks"
        )
    console.print(
        f"the chunk before had {ends.kept:.0%} of a chunk's memories; {ends.foreseen:.0%} of the others were "
        f"prefetched; {ends.hit_rate:.0%} of {ends.guesses} prefetched memories were used"
    )
    for name, is_same in batch.same_tokens.items():
        console.print(f"{name}: {'the same tokens' if is_same else 'OTHER TOKENS'}")


def _show_tiers(found: "TierBench") -> None:
    from rich.console import Console
    from rich.table import Table

    from m3runtime.lab.results import environment

    console = Console()
    for blocks in dict.fromkeys(row.blocks for row in found.rows):
        rows = [row for row in found.rows if row.blocks == blocks]
        title = f"{blocks} blocks, {show_size(rows[0].bytes)}" if blocks > 1 else f"1 block, {show_size(rows[0].bytes)}"
        table = Table("", "median (quartiles)", "per second", "relative speed", "baseline", title=title)
        for row in rows:
            speed = ("", "") if row.baseline == row.name else (row.speed.show(2), row.baseline)
            table.add_row(row.name, str(row.seconds), show_size(row.bytes / row.seconds.median), *speed)
        console.print(table)
    cold = "" if found.has_cold else " (no cold rows: the page cache cannot be emptied here)"
    console.print(
        f"{' > '.join(found.tiers)}, on {found.device}; {found.settings.threads} threads; "
        f"{found.settings.rounds} rounds; page cache warm{cold}; bank: {found.bank}; {environment()['machine']}"
    )
