"""``m3 bench recall``: the time of a recall, stage by stage."""

from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.bench_speed import Threads
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json
from m3runtime.cli.progress import stages
from m3runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3runtime.lab.bench.recall import RecallBench, RecallTimes
    from m3runtime.lab.bench.recall_bank import RecallBankBench


def recall(
    config: ConfigFile = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", min=1, help="Memories of a bank; may be repeated. Default: 1000, 10000 and 100000."),
    ] = None,
    huge: Annotated[bool, typer.Option("--huge", help="Also over a million memories, which takes a while.")] = False,
    bank: Annotated[
        bool, typer.Option("--bank", help="Recall from the configured bank instead, cold and warm; it is only read.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each recalls for another text.")] = 30,
    memories: Annotated[int, typer.Option(min=1, help="Memories of one recall.")] = 5,
    threads: Threads = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Time a recall stage by stage, over synthetic banks of growing size or over the configured one.

    Synthetic banks have small blocks and lie in a temporary folder; 100,000 memories take a minute and 0.5 GB. With
    --bank, a recall whose memories are already decoded (warm) and one that must read them (cold) are compared with the
    time to embed their query.
    """
    if bank and (sizes or huge):
        raise InputError("--size and --huge are for synthetic banks; leave them out with --bank")
    settings = configuration(config, set)
    import torch

    from m3runtime.lab.bench.recall import HUGE, SIZES, RecallBench, RecallSettings, bench_recall
    from m3runtime.lab.bench.recall_bank import RecallBankSettings, bench_bank

    threads = threads or torch.get_num_threads()
    chosen = (*(sizes or SIZES), *([HUGE] if huge else []))
    names = {f"bank {size:,}": f"Making {size:,} memories" for size in chosen}
    found: RecallBench | RecallBankBench
    with stages({**names, "queries": "Choosing queries", "recall": "Recalling"}, shown=not json) as progress:
        if bank:
            found = bench_bank(settings, RecallBankSettings(rounds, memories, threads), progress)
        else:
            found = bench_recall(settings, RecallSettings(chosen, rounds, memories, threads), progress)
    if json:
        print_json(found.to_json())
        return
    _show_rows(found.rows)
    for line in _growth(found) if isinstance(found, RecallBench) else _warmth(found):
        typer.echo(line)


def _show_rows(rows: "Sequence[RecallTimes]") -> None:
    from rich.console import Console
    from rich.table import Table

    from m3runtime.lab.bench.recall import PARTS, WHOLE

    title = "Milliseconds, median (quartiles); below it, the ratio to the embedding's time"
    table = Table("memories", *PARTS, WHOLE, title=title)
    for row in rows:
        cells = []
        for stage in (*PARTS, WHOLE):
            spread = row.stages[stage]
            ratio = f"\n{row.of_embedding[stage].median:.2f}" if stage in row.of_embedding else ""
            cells.append(f"{1e3 * spread.median:.2f} ({1e3 * spread.low:.2f} to {1e3 * spread.high:.2f}){ratio}")
        name = row.name if row.name == f"{row.memories:,}" else f"{row.name}, {row.memories:,}"
        table.add_row(name, *cells)
    Console().print(table)


def _growth(found: "RecallBench") -> list[str]:
    from m3runtime.lab.results import environment

    first, last = found.built[0], found.built[-1]
    return [
        *(
            f"{stage}: {growth.show(2)} times as long at {last.memories:,} as at {first.memories:,}"
            for stage, growth in found.growth.items()
        ),
        f"{last.memories:,} memories were made in {last.home_s:.0f} s and indexed in {last.index_s:.0f} s; "
        f"on {found.device}; {found.settings.threads} threads; {found.settings.rounds} texts; no caching tiers, page "
        f"cache warm; {found.embedder}; {environment()['machine']}",
    ]


def _warmth(found: "RecallBankBench") -> list[str]:
    from m3runtime.lab.bench.recall import WHOLE
    from m3runtime.lab.results import environment

    rounds = found.settings.rounds
    return [
        *(f"{row.name}: {row.of_embedding[WHOLE].show(2)} times the embedding of the query" for row in found.rows),
        f"cold over warm: {found.cold_of_warm.show(2)}",
        f"warm recalls that read or decoded a block: {found.warm_decoded} of {rounds}; that chose other memories: "
        f"{found.warm_other}",
        f"on {found.device}; {found.settings.threads} threads; {rounds} rounds; {found.settings.memories} memories, "
        f"{found.memory_tokens.show(0)} tokens; no caching tiers, page cache as it is; {environment()['machine']}",
    ]
