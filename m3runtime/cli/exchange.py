"""``m3 export`` and ``m3 import``: the references of a bank as a file for other programs, and back."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say
from m3runtime.cli.write import Ray, Workers, pool_of

if TYPE_CHECKING:
    from m3runtime.bank.exchange.record import Record


def export(
    path: Annotated[Path, typer.Argument(help="The file to write: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.")],
    embeddings: Annotated[bool, typer.Option(help="With the embedding of each reference.")] = True,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Write all references with their headings, places and embeddings into a file; no model is needed.

    An existing file is replaced when the new one is whole.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.bank.exchange.export import exported
    from m3runtime.bank.exchange.files import format_of, write_records
    from m3runtime.documents import expiry

    format_of(path)
    count, damaged = 0, dict[int, str]()
    with closing(assembly.open_bank(settings, read_only=True)) as bank, progress_bars(shown=not json) as progress:
        total = len(bank.home.ids())
        manifest = bank.manifest

        def counted() -> "Iterator[tuple[int, Record]]":
            nonlocal count
            found = exported(
                bank.home, manifest.embedder, manifest.dim, damaged, embeddings=embeddings, today=expiry.today
            )
            for record in found:
                yield record
                count += 1
                if count % 1000 == 0:
                    progress("Exporting references", count, max(count, total))

        write_records(path, counted())
    if damaged:
        say(f"{len(damaged)} damaged records were left out, such as {next(iter(damaged.values()))}", err=True)
    if json:
        print_json({"references": count, "damaged": sorted(damaged), "file": str(path)})
    else:
        say(f"{count} references exported: {path}")


def import_(
    path: Annotated[Path, typer.Argument(help="A file that `m3 export` wrote, or others with a field `text`.")],
    config: ConfigFile = None,
    catalogue: Annotated[
        bool,
        typer.Option("--catalogue", help="Only embed: each is encoded at its first recall (recall.cold_start)."),
    ] = False,
    workers: Workers = None,
    ray: Ray = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Add references out of a file to the bank, and create the bank if it does not exist.

    The model encodes them. Embeddings are taken over if the same embedder made them; with --workers or --ray this
    process computes the others. Nothing is forgotten, and a
    reference that the bank has already gets further places. Its source is read anew when it is written again.
    """
    settings = configuration(config, set)
    from m3runtime.bank.exchange.files import read_records

    for _ in read_records(path):
        pass  # a mistake shows before a model is loaded

    from m3runtime import assembly
    from m3runtime.writing.importing import import_records

    with (
        closing(assembly.open_adapter(settings)) as adapter,
        closing(assembly.open_embedder(settings)) as embedder,
        progress_bars(shown=not json) as progress,
    ):
        report = import_records(
            settings,
            adapter,
            embedder,
            read_records(path),
            catalogue=catalogue,
            pool=pool_of(workers, ray),
            progress=progress,
        )
    written = report.written
    if json:
        print_json({**asdict(written), "embeddings_taken": report.taken, "bank": str(settings.bank)})
        return
    new = f"{written.catalogued} references catalogued" if catalogue else f"{written.written} memories written"
    say(
        f"{new}, {written.known} known already; {report.taken} embeddings taken over, in {written.seconds:.1f} s: "
        f"{settings.bank}"
    )
