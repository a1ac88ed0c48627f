"""``m3 write``: write texts into a bank."""

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import (
    ConfigFile,
    Json,
    Set,
    TextField,
    as_text,
    configuration,
    documents_fields,
    overrides,
    parsed,
)
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from m3runtime.documents.expiry import Expiry
    from m3runtime.documents.survey import Survey
    from m3runtime.writing.encoders.pool import EncoderPool
    from m3runtime.writing.mirror import MirrorReport

Paths = Annotated[
    list[Path], typer.Argument(help="Files or folders: text, HTML, JSONL, PDF, Office, EPUB, code and more.")
]
Whole = Annotated[bool, typer.Option("--whole", help="Each document is one reference; do not split.")]
KeepMissing = Annotated[
    bool, typer.Option("--keep-missing", help="Keep the memories of files that are no longer in a folder.")
]
Expires = Annotated[
    str | None,
    typer.Option(
        "--expires",
        metavar="WHEN",
        help="Forget after this day in UTC: 2027-01-31, 90d or 12w from now, or never; default: as before.",
        show_default=False,
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="KEY=VALUE",
        help="Metadata of these files, to cite and to filter by (--where, recall.where); default: as before.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="Processes that encode, each on a GPU of its own if there are several; this one commits. Default: "
        "this one does both; with --ray an actor for each GPU, or for each machine if there is none.",
        show_default=False,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Encode by actors of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local to start one here.",
    ),
]
NoTags = Annotated[bool, typer.Option("--no-tags", help="Remove the tags that these files have.")]

_NAMED = 3
"""Lines about what could not be read in one file."""


def write(
    paths: Paths,
    config: ConfigFile = None,
    text_field: TextField = None,
    whole: Whole = False,
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="Only embed: each is encoded at its first recall (recall.cold_start).")
    ] = False,
    keep_missing: KeepMissing = False,
    expires: Expires = None,
    tag: Tags = None,
    no_tags: NoTags = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List the files that changed.")] = False,
    workers: Workers = None,
    ray: Ray = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Bring the bank in step with files and folders, and create the bank if it does not exist.

    What is new is remembered, what changed is replaced, and what is gone from a file, or from a folder that is written
    again, is forgotten. Unchanged files are not read, and cost no model. It can be interrupted at any moment and run
    again. A file that cannot be read, or a line of JSON, is left out and named; the exit status is 1 if that was in a
    file which was named itself. References that were only catalogued are encoded when they are written without
    --catalogue. A corpus may be larger than the machine's memory. Whatever has expired is forgotten first.
    """
    settings = configuration(config, set)
    from m3runtime.documents.survey import Reading
    from m3runtime.writing.mirror import Mirror

    fields = documents_fields(settings, text_field)
    reading = Reading(fields, whole, catalogue, expiry_of(expires), tags_of(tag, none=no_tags))
    with closing(Mirror(settings, reading, keep_missing=keep_missing, pool=pool_of(workers, ray))) as mirror:
        if dry_run:
            survey = mirror.survey(paths)
            if json:
                print_json({**_differences(survey), "bank": str(settings.bank)})
            else:
                _list(survey)
                say(f"{counted(survey)}; nothing was changed: {settings.bank}")
            return
        with progress_bars(shown=not json) as progress:
            report = mirror.write(paths, progress, lambda warning: say(f"warning: {warning}", err=True))
    if json:
        print_json({**facts(report), "bank": str(settings.bank)})
    else:
        show(report, settings.bank, verbose=verbose)
    named = {mirror.names.name(path) for path in paths if not path.is_dir()}
    if named & report.survey.unread.keys():
        raise typer.Exit(1)


def pool_of(workers: int | None, ray: str | None) -> "EncoderPool | None":
    """The encoders of ``--workers`` and ``--ray``; None: the writer encodes. Raises `PluginError`."""
    if ray is not None:
        from m3runtime.plugins.loading import load

        pool: EncoderPool = load("pools", "ray")(address=ray, size=workers)
        return pool
    if workers is None or workers == 1:
        return None
    from m3runtime.writing.encoders.processes import ProcessPool  # loads torch

    return ProcessPool(workers)


def expiry_of(expires: str | None) -> "Expiry | None":
    """The value of ``--expires``. Raises `InputError`."""
    from m3runtime.documents.expiry import Expiry, today

    return None if expires is None else parsed("--expires", partial(Expiry.parse, today=today()), expires)


def tags_of(tags: list[str] | None, *, none: bool) -> dict[str, str] | None:
    """The values of ``--tag``; no tags with ``--no-tags``; None: each file keeps its own. Raises `InputError`."""
    from m3runtime.documents.tags import checked

    if tags and none:
        raise InputError("--tag and --no-tags exclude each other")
    for name, value in (found := overrides(tags, "--tag")).items():
        as_text("--tag", name + value)
    if len(found) < len(tags or ()):
        raise InputError("--tag: the same key is given twice")
    return checked(found) if tags or none else None


def show(report: "MirrorReport", bank: Path, *, verbose: bool = False) -> None:
    """Print a report for people, with what could not be read last."""
    if verbose:
        _list(report.survey)
    say(f"{summary(report)}: {bank}")
    written = report.written
    if written is not None and written.codec is not None:
        say(f"the codec ({written.codec}) was trained, and encodes memories from now on")
    if written is not None and written.reencoded:
        stay = f"; {written.left} stay in int8, since it would lose too much of them" if written.left else ""
        say(f"{written.reencoded} memories that were in int8 were encoded anew{stay}")
    if expired := report.survey.expired:
        say(f"{len(expired)} files have expired and are not read, such as {expired[0]}; --expires gives another day")
    if skipped := report.survey.skipped:
        say(f"{len(skipped)} files were passed over, such as {skipped[0]}", err=True)
    for kind, found in (("left out", report.survey.left_out), ("not read", report.survey.unread)):
        for source, several in found.items():
            for one in several[:_NAMED]:
                say(f"{kind}: {one}", err=True)
            if len(several) > _NAMED:
                say(f"{kind}: {len(several) - _NAMED} more in {source}", err=True)


def summary(report: "MirrorReport") -> str:
    """The counts of a report in a line."""
    written, parts = report.written, [counted(report.survey)]
    if written is not None:
        new = (
            f"{written.catalogued} references catalogued"
            if written.catalogued
            else f"{written.written} memories written"
        )
        parts = [f"{new}, {written.known + report.known} known already", *parts]
    if report.forgotten:
        parts.append(f"{report.forgotten} memories forgotten")
    if report.expired:
        parts.append(f"{report.expired} memories had expired, and are forgotten")
    if written is not None:
        parts.append(f"{show_size(written.bytes)} in {written.seconds:.1f} s")
    return "; ".join(parts)


def facts(report: "MirrorReport") -> dict[str, Any]:
    """The numbers of `WriteReport`, also where there was nothing to read, and the sources of each kind."""
    numbers = dict.fromkeys(
        ("documents", "references", "written", "known", "catalogued", "bytes", "seconds", "reencoded", "left"), 0
    )
    written = {**numbers, "codec": None, **({} if report.written is None else asdict(report.written))}
    known = {"known": written["known"] + report.known, "forgotten": report.forgotten, "expired": report.expired}
    return {**written, **known, **_differences(report.survey)}


def counted(survey: "Survey") -> str:
    """The number of sources of each kind that there is."""
    counts = {name: len(some) for name, some in _groups(survey).items()}
    return "files: " + (", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none")


def _groups(survey: "Survey") -> dict[str, list[str]]:
    former = set(survey.renamed.values())  # the file is there, under another name
    gone = [name for name in survey.gone if name not in former]
    groups = {name: sorted(getattr(survey, name)) for name in ("new", "changed", "renamed", "unchanged")}
    return {**groups, "gone": sorted(gone)}


def _differences(survey: "Survey") -> dict[str, Any]:
    return {
        "sources": {**_groups(survey), "renamed": dict(survey.renamed)},
        "expired_files": list(survey.expired),
        "skipped": [str(path) for path in survey.skipped],
        "left_out": {name: list(runs) for name, runs in survey.left_out.items()},
        "unread": {name: list(reasons) for name, reasons in survey.unread.items()},
    }


def _list(survey: "Survey") -> None:
    for name, some in _groups(survey).items():
        for source in some if name != "unchanged" else ():
            origin = f" (was {survey.renamed[source]})" if name == "renamed" else ""
            say(f"{name:>9}  {source}{origin}")
