"""``m3 search``, ``inspect``, ``forget`` and ``compact``: look into a bank, and remove memories from it."""

from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.citing import citation, cited, summarised
from m3runtime.cli.options import ConfigFile, Json, Set, Where, as_text, configuration, restriction
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from m3runtime.bank.bank import Bank


def search(
    text: Annotated[str, typer.Argument(help="What to look for.")],
    config: ConfigFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many references to print.")] = 5,
    where: Where = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Print the references nearest to a text, whatever their scores; no model is needed."""
    settings = configuration(config, set)
    if not as_text("the text", text).strip():
        raise InputError("there is nothing to search for: the text is blank")
    limits = restriction(where)
    from m3runtime.runtime import Runtime

    with Runtime.open(settings, read_only=True) as runtime:
        (matches,) = runtime.search([text], k, limits)
        references = runtime.cited(matches)
    found = [(match, one) for match, one in zip(matches, references, strict=True) if one is not None]
    if json:
        print_json([{"id": match.id, "score": round(match.score, 4), **citation(one)} for match, one in found])
        return
    for match, one in found:
        say(f"{match.score:.3f}  {match.id:>6}  {cited(one)}\n    {' '.join(one.text.split())}")


def inspect(
    id: Annotated[int | None, typer.Argument(min=0, help="One memory; default: the bank as a whole.")] = None,
    all: Annotated[bool, typer.Option("--all", help="List every source, not the folders of many.")] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Print the contents and the origin of a bank, or one of its memories."""
    settings = configuration(config, set)
    from m3runtime import assembly

    with closing(assembly.open_bank(settings, read_only=True)) as bank:
        facts = _bank_facts(bank) if id is None else _memory_facts(bank, id)
    if json:
        print_json(facts)
        return
    if id is None and not all:
        facts["sources"] = summarised(facts["sources"])
    if id is None:
        facts["erasures"] = {one["at"]: f"{one['memories']} memories" for one in facts["erasures"]}
    for name, value in facts.items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, part in value.items():
                say(f"  {key}: {part}")
        else:
            say(f"{name}: {show_size(value) if name.endswith('bytes') else value}")


def forget(
    what: Annotated[
        list[str] | None, typer.Argument(help="Ids of memories, files, folders, patterns such as 'docs/*.md'.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="A file, folder, pattern or source, whatever it looks like.")
    ] = None,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Forget all quarantined memories.")] = False,
    expired: Annotated[bool, typer.Option("--expired", help="Forget what has expired.")] = False,
    erase: Annotated[
        bool, typer.Option("--erase", help="Leave no byte of it in the bank's files, as `m3 compact` does.")
    ] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Delete memories and their references for good: from the bank, its index and every persistent tier.

    A number is the id of a memory. A text that also stands in another file is remembered from there. A file that is
    still in its folder is remembered again when the folder is written again.
    """
    settings = configuration(config, set)
    if not (what or source or quarantined or expired):
        raise InputError("nothing to forget is given: name ids, files, --source, --quarantined or --expired")
    from m3runtime import assembly
    from m3runtime.bank import records
    from m3runtime.documents.expiry import today
    from m3runtime.documents.sources import SourceNames
    from m3runtime.memory.block import as_ids
    from m3runtime.writing import erasure
    from m3runtime.writing.forgetting import drop_traces, sources_of
    from m3runtime.writing.moving import Moves

    ids = [int(one) for one in what or () if one.isdecimal()]
    paths = [*(one for one in what or () if not one.isdecimal()), *(source or ())]
    with closing(assembly.open_bank(settings)) as bank:
        names, home = SourceNames(settings.bank), bank.home
        known = sorted({*home.sources(), *home.states()}) if paths else []
        chosen = dict.fromkeys(one for path in paths for one in sources_of(path, names, known))
        found, damaged = records.references(home, as_ids(ids))
        unknown = [id for id, one in zip(ids, found, strict=True) if one is None and id not in damaged]
        if unknown:
            raise InputError(f"the bank has no memory {', '.join(map(str, unknown))}; nothing was forgotten")
        moves = Moves(home)
        moves.drop([*ids, *(home.quarantined() if quarantined else ())])
        for name, record in chosen:
            moves.forget(name, record)
        if erase:
            erasure.begin(home)
        moves.make()
        if expired:
            moves.expire(today())
        failed = drop_traces(settings, bank, moves.forgotten)
        for name in failed:
            say(f"tier {name} failed: what it still holds is discarded when it is used again", err=True)
        erased = erasure.finish_begun(settings, bank)
    if json:
        facts = {"forgotten": sorted(moves.forgotten)}
        print_json(facts if erased is None else {**facts, "erased": asdict(erased)})
    else:
        say(f"{len(moves.forgotten)} memories forgotten" + ("" if erased is None else " and erased"))


def compact(config: ConfigFile = None, set: Set = None, json: Json = False) -> None:
    """Leave no byte of forgotten memories in the bank's files, and give their room back to the drive.

    Needs as much room on the drive as the bank takes, while it runs. Others may read the bank meanwhile. If it is
    killed, the next command that writes to the bank finishes it.
    """
    settings = configuration(config, set)
    from m3runtime import assembly
    from m3runtime.writing import erasure

    with closing(assembly.open_bank(settings)) as bank:
        before = bank.home.stored_bytes()
        erased = erasure.finish(settings, bank)
        freed = max(0, before - bank.home.stored_bytes())
    if json:
        print_json({"erased": asdict(erased), "freed_bytes": freed, "bank": str(settings.bank)})
    else:
        say(f"{erased.memories} forgotten or replaced memories erased; {show_size(freed)} given back: {settings.bank}")


def _bank_facts(bank: "Bank") -> dict[str, Any]:
    from m3runtime.bank import records
    from m3runtime.bank.erasures import Erasures
    from m3runtime.documents.expiry import is_over, today

    manifest, home, erasures = bank.manifest, bank.home, Erasures.of(bank.home)
    distortion = bank.codec.measured
    cold, expiring, day = len(home.cold()), home.expiring(), today()
    ahead = [last for last in expiring if not is_over(last, day)]
    several: dict[str, Any] = {}
    if manifest.planned is not None:
        several["planned_codec"] = {"kind": manifest.planned.kind, **manifest.planned.options}
    if manifest.others:
        several["other_codecs"] = {one.fingerprint: {"kind": one.kind, **one.options} for one in manifest.others}
    return {
        "bank": str(bank.path),
        "memories": len(home.ids()) - cold,
        "cold": cold,
        "quarantined": len(home.quarantined()),
        "expiring": {
            "memories": len({id for last in ahead for id in expiring[last].tolist()}),
            "next": ahead[0] if ahead else None,
            "expired": len(records.expired(home, day)),
        },
        "stored_bytes": home.stored_bytes(),
        "slot_bytes": home.slot_bytes,
        "model": f"{manifest.model_name} ({manifest.model[:16]})",
        "embedder": f"{manifest.embedder_name} ({manifest.embedder[:16]}, {manifest.dim} dimensions)",
        "sink": manifest.sink,
        "spec": manifest.spec.to_json(),
        "codec": {
            "kind": manifest.codec_kind,
            **manifest.codec_options,
            "fingerprint": manifest.codec,
            **({} if distortion is None else {"key_error": distortion.keys, "value_error": distortion.values}),
        },
        **several,
        "codec_bytes": sum(path.stat().st_size for path, _ in bank.codecs.files()),
        **_bias_facts(bank),
        "fingerprint": bank.stamp.bank,
        "erasures": [asdict(one) for one in erasures.done],
        "erasing": erasures.begun,
        "sources": dict(sorted(home.sources().items())),
    }


def _bias_facts(bank: "Bank") -> dict[str, Any]:
    """The file of bias directions, if there is one: its facts, or why it cannot be used."""
    from m3runtime.bank.bias import BIAS, BiasDirections
    from m3runtime.errors import BankError

    try:
        found = BiasDirections.load(bank.path, bank.manifest)
    except BankError as error:
        return {"bias": {"error": str(error)}}
    if found is None:
        return {}
    names = ("dtype", "offset", "length", "null_level", "null_weight", "weights", "weight_error", "greatest_error")
    facts = {name: getattr(found.facts, name) for name in names}
    return {"bias": {"bytes": (bank.path / BIAS).stat().st_size, **facts}}


def _memory_facts(bank: "Bank", id: int) -> dict[str, Any]:
    import torch

    from m3runtime.errors import BlockError
    from m3runtime.memory import block
    from m3runtime.memory.block import as_ids

    (reference,) = bank.home.references(as_ids([id]))
    if reference is None:
        raise InputError(f"the bank has no memory {id}")
    slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
    kind, state = None, "cold" if len(bank.home.cold(as_ids([id]))) else "missing"
    if bank.home.read(as_ids([id]), slot)[0]:
        try:
            block.check(slot[0].numpy(), id=id, stamp=bank.codecs)
            state, kind = "good", bank.codecs.of(block.headers(slot.numpy())[0]).kind
        except BlockError as error:
            state = str(error)
    return {
        "id": id,
        **citation(reference),
        "tokens": reference.tokens,
        "block_bytes": block.length(slot[0].numpy()) if state == "good" else 0,
        "block": bank.home.quarantined().get(id, state),
        "codec": kind,
    }
