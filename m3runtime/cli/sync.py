"""``m3 sync``: keep a bank in step with folders."""

from contextlib import closing
from typing import Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, TextField, configuration, documents_fields
from m3runtime.cli.terminal import print_json, say
from m3runtime.cli.write import (
    Expires,
    KeepMissing,
    NoTags,
    Paths,
    Ray,
    Tags,
    Whole,
    Workers,
    expiry_of,
    facts,
    pool_of,
    show,
    tags_of,
    write,
)


def sync(
    paths: Paths,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, and follow every change in these folders until Ctrl-C.")
    ] = False,
    config: ConfigFile = None,
    text_field: TextField = None,
    whole: Whole = False,
    keep_missing: KeepMissing = False,
    expires: Expires = None,
    tag: Tags = None,
    no_tags: NoTags = False,
    workers: Workers = None,
    ray: Ray = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Bring the bank in step with folders, as `m3 write` does, and with --watch keep it so.

    Each change prints a line. The bank is open only while it changes, so that other commands can write between two
    changes. The command can be killed at any moment and started again. A file that cannot be read is named, and tried
    again.
    """
    if not watch:
        write(
            paths,
            config,
            text_field,
            whole,
            keep_missing=keep_missing,
            expires=expires,
            tag=tag,
            no_tags=no_tags,
            workers=workers,
            ray=ray,
            set=set,
            json=json,
        )
        return
    settings = configuration(config, set)
    from m3runtime.documents.survey import Reading
    from m3runtime.errors import M3Error
    from m3runtime.writing.following import follow
    from m3runtime.writing.mirror import Mirror

    reading = Reading(
        documents_fields(settings, text_field), whole, expiry=expiry_of(expires), tags=tags_of(tag, none=no_tags)
    )
    with closing(Mirror(settings, reading, keep_missing=keep_missing, pool=pool_of(workers, ray))) as mirror:
        for report in follow(mirror, paths):
            if isinstance(report, M3Error):
                say(f"m3: {report}", err=True)
            elif json:
                print_json({**facts(report), "bank": str(settings.bank)})
            else:
                show(report, settings.bank)
