"""``m3 verify``: check a bank, and repair it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from m3runtime.writing.repair import RepairReport
    from m3runtime.writing.verification import VerifyReport

_SHOWN = 20
"""The number of lines of damage that are printed; JSON has all."""


def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Repair the damage, with the bank's own model.")] = False,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="With --repair: only quarantine damaged memories, and compute nothing.")
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop", help="With --repair: forget memories whose own text is damaged.")
    ] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Check every part of a bank for damage, and repair it with --repair.

    The exit code is 1 if anything is damaged, and with --repair if anything still is. Without --repair it needs no
    model, changes nothing, and can run while others read and write.
    """
    settings = configuration(config, set)
    if (no_model or drop) and not repair:
        raise InputError(f"{'--no-model' if no_model else '--drop'} is an option of --repair: give that, too")
    from m3runtime.writing import repair as repairing
    from m3runtime.writing import verification

    mended = None
    with progress_bars(shown=not json) as progress:
        if repair:
            mended = repairing.repair(settings, compute=not no_model, drop=drop, progress=progress)
            report, left = mended.found, mended.left
        else:
            report = left = verification.verify(settings, progress)
    if json:
        print_json(_facts(str(settings.bank), report, mended))
    else:
        _show(str(settings.bank), report, mended)
    if not left.clean:
        raise typer.Exit(1)


def _facts(bank: str, report: "VerifyReport", mended: "RepairReport | None") -> dict[str, Any]:
    facts = {
        "bank": bank,
        "clean": (report if mended is None else mended.left).clean,
        **{name: getattr(report, name) for name in ("blocks", "good", "bad", "bytes", "quarantined", "cold")},
        "codecs": dict(report.codecs),
        "damage": _damage_facts(report),
        "notes": list(report.notes),
    }
    if mended is not None:
        facts["repair"] = {
            "quarantined": list(mended.quarantined),
            "recomputed": {str(old): new for old, new in mended.recomputed.items()},
            "dropped": list(mended.dropped),
            "left": _damage_facts(mended.left),
        }
    return facts


def _damage_facts(report: "VerifyReport") -> list[dict[str, Any]]:
    return [{**asdict(one), "source": None if one.id is None else report.sources.get(one.id)} for one in report.damage]


def _show(bank: str, report: "VerifyReport", mended: "RepairReport | None") -> None:
    say(
        f"{bank}: {report.blocks} memories, {report.good} good, {report.bad} bad ({report.quarantined} quarantined); "
        f"{show_size(report.bytes)} of good blocks" + (f"; {report.cold} references are cold" if report.cold else "")
    )
    if len(report.codecs) > 1:
        say("  blocks by codec: " + ", ".join(f"{count} {name}" for name, count in report.codecs.items()))
    for note in report.notes:
        say(f"  note: {note}")
    _show_damage(report, "damaged:", _advice(report) if mended is None else [])
    if mended is None:
        if report.clean:
            say("nothing is damaged")
        return
    if not report.clean:
        say(
            f"{len(mended.quarantined)} memories quarantined, {len(mended.recomputed)} computed again under new ids, "
            f"{len(mended.dropped)} forgotten"
        )
        _show_damage(mended.left, "still damaged:", _advice(mended.left, repaired=True))
    if mended.left.clean:
        say("the bank is sound")


def _show_damage(report: "VerifyReport", title: str, advice: list[str]) -> None:
    if report.clean:
        return
    say(title)
    for one in report.damage[:_SHOWN]:
        source = "" if one.id is None else f", memory {one.id} ({report.sources.get(one.id, 'source unknown')})"
        say(f"  {one.where}{source}: {one.what}")
    if len(report.damage) > _SHOWN:
        say(f"  and {len(report.damage) - _SHOWN} more; --json lists all")
    for line in advice:
        say(line)


def _advice(report: "VerifyReport", *, repaired: bool = False) -> list[str]:
    """Advice about the damage."""
    damage, lines = report.damage, []
    lost = {one.id for one in damage if one.id is not None and one.id not in report.sources}
    if any(one.where in ("manifest", "codec") for one in damage):
        return ["a damaged manifest or codec cannot be repaired: restore it from a copy, or write the bank anew"]
    if any(one.id in report.sources or one.where == "index" for one in damage):
        without = " without --no-model" if repaired else ""
        lines.append(f"`m3 verify --repair`{without} computes these memories again from their texts")
    if lost:
        lines.append(
            f"the texts of {len(lost)} memories are lost: `m3 verify --repair --drop` forgets them, "
            "and their sources can be written again"
        )
    if any(one.id is None and one.where == "home" for one in damage):
        lines.append("where repairing does not help, restore the bank from a copy, or write it anew")
    return lines
