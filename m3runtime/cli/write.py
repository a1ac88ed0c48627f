"""``m3 write``: write texts into a bank."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli import scripts
from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import stages
from m3runtime.cli.terminal import print_json, say
from m3runtime.observe.figures import show_size


def write(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders: txt, md, rst, html, jsonl.")],
    config: ConfigFile = None,
    text_field: Annotated[str, typer.Option(help="The field of a jsonl line that holds the text.")] = "text",
    whole: Annotated[bool, typer.Option("--whole", help="Each document is one reference; do not split.")] = False,
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="Only embed: each is encoded at its first recall (recall.cold_start).")
    ] = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Write texts into the bank, and create the bank if it does not exist.

    It can be interrupted at any moment and run again: it resumes, and stores nothing twice. References that were only
    catalogued are encoded when they are written without --catalogue. A corpus may be larger than the machine's memory.
    """
    settings = configuration(config, set)
    from m3runtime.documents.reading import find_files, read_documents
    from m3runtime.documents.sample import Sample

    _, skipped = find_files(paths)
    sample = Sample()
    for document in read_documents(paths, text_field=text_field):
        for _ in sample.of(document.blocks()):
            pass  # a file that cannot be read shows before a model is loaded

    from m3runtime import assembly
    from m3runtime.writing.writer import Writer

    adapter = assembly.open_adapter(settings)
    embedder = assembly.open_embedder(settings)
    warning = scripts.warning(embedder, sample.texts)
    if warning:
        say(f"warning: {warning}", err=True)
    with stages(shown=not json) as progress:
        report = Writer(settings, adapter, embedder).write(
            read_documents(paths, text_field=text_field), whole=whole, catalogue=catalogue, progress=progress
        )
    if json:
        print_json({**asdict(report), "bank": str(settings.bank), "skipped": [str(path) for path in skipped]})
        return
    if catalogue:
        say(
            f"{report.catalogued} references catalogued, {report.known} known already, from {report.documents} "
            f"documents, in {report.seconds:.1f} s: {settings.bank}"
        )
    else:
        say(
            f"{report.written} memories written, {report.known} known already, from {report.documents} documents; "
            f"{show_size(report.bytes)} in {report.seconds:.1f} s: {settings.bank}"
        )
    if skipped:
        say(f"{len(skipped)} files were passed over, such as {skipped[0]}", err=True)
