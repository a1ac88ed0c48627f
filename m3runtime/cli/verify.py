"""``m3 verify``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json, show_size
from m3runtime.cli.progress import stages
from m3runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from m3runtime.abilities import Damage
    from m3runtime.repair import RepairReport
    from m3runtime.verification import VerifyReport

_STAGES = {
    "home": "Reading the home's books",
    "blocks": "Reading memories",
    "index": "Comparing the index",
    "codec": "Training the codec",
    "memories": "Computing memories again",
}
_SHOWN = 20
"""Lines of damage that are printed; JSON has all."""


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended, with the bank's own model.")
    ] = False,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="With --repair: only quarantine what is damaged, and compute nothing.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="With --repair: forget memories whose own text is damaged.")
    ] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Read all of a bank and say what is damaged; exit code 1 if anything is, and still is after --repair.

    Needs no model without --repair, changes nothing, and can run while others read and write.
    """
    settings = configuration(config, set)
    if (no_model or drop) and not repair:
        raise InputError(f"{'--no-model' if no_model else '--drop'} says how to repair: give --repair too")
    from m3runtime import repair as repairing
    from m3runtime import verification

    mended = None
    with stages(_STAGES, shown=not json) as progress:
        if repair:
            mended = repairing.repair(settings, compute=not no_model, drop=drop, progress=progress)
            report, left = mended.found, mended.left
        else:
            report = verification.verify(settings, progress)
            left = report.damage
    if json:
        print_json(_facts(str(settings.bank), report, mended))
    else:
        _show(str(settings.bank), report, mended)
    if left:
        raise typer.Exit(1)


def _facts(bank: str, report: "VerifyReport", mended: "RepairReport | None") -> dict[str, Any]:
    facts = {
        "bank": bank,
        "clean": not (report.damage if mended is None else mended.left),
        **{name: getattr(report, name) for name in ("blocks", "good", "bad", "bytes", "quarantined")},
        "damage": [
            {**asdict(one), "source": report.sources.get(-1 if one.id is None else one.id)} for one in report.damage
        ],
        "notes": list(report.notes),
    }
    if mended is not None:
        facts["repair"] = {
            "quarantined": list(mended.quarantined),
            "recomputed": {str(old): new for old, new in mended.recomputed.items()},
            "dropped": list(mended.dropped),
            "left": [asdict(one) for one in mended.left],
        }
    return facts


def _show(bank: str, report: "VerifyReport", mended: "RepairReport | None") -> None:
    typer.echo(
        f"{bank}: {report.blocks} memories, {report.good} good, {report.bad} bad ({report.quarantined} quarantined); "
        f"{show_size(report.bytes)} of good blocks"
    )
    for note in report.notes:
        typer.echo(f"  note: {note}")
    _list("damaged:", report.damage, report)
    if mended is None:
        for line in _advice(report.damage, repaired=False):
            typer.echo(line)
        return
    if report.damage:
        typer.echo(
            f"{len(mended.quarantined)} memories quarantined, {len(mended.recomputed)} computed again under new ids, "
            f"{len(mended.dropped)} forgotten"
        )
    _list("still damaged:", mended.left, report)
    for line in _advice(mended.left, repaired=True):
        typer.echo(line)
    if not mended.left:
        typer.echo("the bank is sound")


def _list(title: str, damage: "Sequence[Damage]", report: "VerifyReport") -> None:
    if damage:
        typer.echo(title)
    for one in damage[:_SHOWN]:
        source = "" if one.id is None else f" of memory {one.id} ({report.sources.get(one.id, 'source unknown')})"
        typer.echo(f"  {one.where}{source}: {one.what}")
    if len(damage) > _SHOWN:
        typer.echo(f"  and {len(damage) - _SHOWN} more; --json lists all")


def _advice(damage: "Sequence[Damage]", *, repaired: bool) -> list[str]:
    """What to do about what is damaged."""
    lost = {one.id for one in damage if one.where == "reference"}
    lines = []
    if any(one.where in ("manifest", "codec") for one in damage):
        lines.append("a damaged manifest or codec cannot be repaired: restore it from a copy, or write the bank anew")
    elif any(one.id is None for one in damage if one.where != "index"):
        lines.append("what is damaged about the home itself cannot be repaired: restore the bank, or write it anew")
    if any(one.id not in lost for one in damage if one.id is not None or one.where == "index"):
        lines.append(
            "`m3 verify --repair` without --no-model computes these memories again from their texts"
            if repaired
            else "`m3 verify --repair` computes these memories again from their texts"
        )
    if lost:
        lines.append(
            f"the texts of {len(lost)} memories are lost: `m3 verify --repair --drop` forgets them, "
            "and their sources can be written again"
        )
    return lines
