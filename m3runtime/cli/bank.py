"""``m3 search``, ``m3 inspect`` and ``m3 forget``: look into a bank, and remove memories from it."""

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, as_text, configuration
from m3runtime.cli.terminal import print_json, say
from m3runtime.errors import InputError
from m3runtime.observe.figures import show_size

if TYPE_CHECKING:
    from m3runtime.bank.bank import Bank


def search(
    text: Annotated[str, typer.Argument(help="What to look for.")],
    config: ConfigFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many references to print.")] = 5,
    set: Set = None,
    json: Json = False,
) -> None:
    """Print the references nearest to a text, whatever their scores; no model is needed."""
    settings = configuration(config, set)
    if not as_text("the text", text).strip():
        raise InputError("there is nothing to search for: the text is blank")
    from m3runtime.runtime import Runtime

    with Runtime.open(settings, read_only=True) as runtime:
        (matches,) = runtime.search([text], k)
        references = runtime.references([match.id for match in matches])
    found = [
        {"id": match.id, "score": round(match.score, 4), "source": one.source, "text": one.text}
        for match, one in zip(matches, references, strict=True)
        if one is not None
    ]
    if json:
        print_json(found)
        return
    for one in found:
        say(f"{one['score']:.3f}  {one['id']:>6}  {one['source']}\n    {' '.join(str(one['text']).split())}")


def inspect(
    id: Annotated[int | None, typer.Argument(min=0, help="One memory; default: the bank as a whole.")] = None,
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
    for name, value in facts.items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, part in value.items():
                say(f"  {key}: {part}")
        else:
            say(f"{name}: {show_size(value) if name.endswith('bytes') else value}")


def forget(
    ids: Annotated[list[int] | None, typer.Argument(min=0, help="Ids of memories.")] = None,
    source: Annotated[list[str] | None, typer.Option("--source", help="Forget all memories from a source.")] = None,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Forget all quarantined memories.")] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Delete memories and their references for good: from the bank, its index and every persistent tier."""
    settings = configuration(config, set)
    if not ids and not source and not quarantined:
        raise InputError("nothing to forget is given: name ids, --source or --quarantined")
    from m3runtime import assembly
    from m3runtime.bank import records
    from m3runtime.memory.block import as_ids
    from m3runtime.storage.hierarchy import Hierarchy

    with closing(assembly.open_bank(settings)) as bank:
        wanted = dict.fromkeys(ids or [])
        for name in source or ():
            of_source = bank.home.ids_of(name).tolist()
            if not of_source:
                raise InputError(f"the bank remembers nothing from {name}; `m3 inspect` lists its sources")
            wanted.update(dict.fromkeys(of_source))
        found, damaged = records.references(bank.home, as_ids(list(wanted)))
        unknown = [id for id, one in zip(wanted, found, strict=True) if one is None and id not in damaged]
        if unknown:
            raise InputError(f"the bank has no memory {', '.join(map(str, unknown))}; nothing was forgotten")
        if quarantined:
            wanted.update(dict.fromkeys(bank.home.quarantined()))
        # Remains of a crash in a tier or in the index are removed when they are opened again.
        tiers = assembly.open_tiers(settings, bank.home.slot_bytes, assembly.device(settings), persistent=True)
        with closing(Hierarchy(tiers, bank.home, bank.stamp)) as hierarchy:
            hierarchy.discard(as_ids(list(wanted)))
            failed = [tier.name for tier in hierarchy.stats() if tier.faults]
        assembly.bank_index(settings, bank).update()
    for name in failed:
        say(f"tier {name} failed: what it still holds is discarded when it is used again", err=True)
    if json:
        print_json({"forgotten": list(wanted)})
    else:
        say(f"{len(wanted)} memories forgotten")


def _bank_facts(bank: "Bank") -> dict[str, Any]:
    manifest, home = bank.manifest, bank.home
    distortion = getattr(bank.codec, "measured", None)
    cold = len(home.cold())
    return {
        "bank": str(bank.path),
        "memories": len(home.ids()) - cold,
        "cold": cold,
        "quarantined": len(home.quarantined()),
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
        "fingerprint": bank.stamp.bank,
        "sources": dict(home.sources()),
    }


def _memory_facts(bank: "Bank", id: int) -> dict[str, Any]:
    import torch

    from m3runtime.errors import BlockError
    from m3runtime.memory import block
    from m3runtime.memory.block import as_ids

    (reference,) = bank.home.references(as_ids([id]))
    if reference is None:
        raise InputError(f"the bank has no memory {id}")
    slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
    state = "cold" if len(bank.home.cold(as_ids([id]))) else "missing"
    if bank.home.read(as_ids([id]), slot)[0]:
        try:
            block.check(slot[0].numpy(), id=id, stamp=bank.stamp)
            state = "good"
        except BlockError as error:
            state = str(error)
    return {
        "id": id,
        "source": reference.source,
        "span": f"{reference.start}-{reference.end}",
        "tokens": reference.tokens,
        "block_bytes": block.length(slot[0].numpy()) if state == "good" else 0,
        "block": bank.home.quarantined().get(id, state),
        "text": reference.text,
    }
