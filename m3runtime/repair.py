"""`repair`: makes a damaged bank sound again, from the texts that it remembers."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from m3runtime import assembly, records
from m3runtime.abilities import Damage
from m3runtime.adapter import Adapter
from m3runtime.bank import INDEX, Bank, LoadCodec, as_ids, read_manifest
from m3runtime.config import Config
from m3runtime.encoding import GROUP, encoded
from m3runtime.retrieval import Embedder
from m3runtime.tier import Reference
from m3runtime.verification import OnProgress, VerifyReport, examine, home_folder


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair` found and did."""

    found: VerifyReport
    quarantined: tuple[int, ...]
    """What was set apart before anything else."""
    recomputed: Mapping[int, int]
    """Memories that were computed again: the id that each had, and the one that it has now."""
    dropped: tuple[int, ...]
    """What was forgotten because nobody knows its text any more."""
    left: tuple[Damage, ...]
    """What is still wrong."""


def repair(
    config: Config, *, compute: bool = True, drop: bool = False, progress: OnProgress | None = None
) -> RepairReport:
    """Examine a bank and mend what can be mended. It can be stopped at any instant and called again.

    Damaged memories are quarantined first, so that nothing recalls them. With ``compute`` those whose reference is
    intact are computed again, by the bank's own model and under new ids; with ``drop`` the others are forgotten. No
    text is forgotten that can still be read. A damaged manifest or codec cannot be mended, and nothing is changed then.

    Raises `BankBusyError` if the bank is open for writing already, and `BankMismatchError`, before anything is
    changed, if the configured model or embedder is not the bank's.
    """
    with assembly.open_home(config)(path=home_folder(config)) as home, ExitStack() as opened:
        found = examine(config, home, progress)
        if any(one.where in ("manifest", "codec") for one in found.damage):
            return RepairReport(found, (), {}, (), found.damage)
        bank = Bank.over(config.bank, home, read_manifest(config.bank, home), LoadCodec(config.codec.kind))
        wrong = [one for one in found.damage if one.where != "index" and one.id is not None]
        reasons = {one.id: f"{one.where}: {one.what}" for one in reversed(wrong) if one.id is not None}
        references, _ = records.references(home, as_ids(sorted(reasons)))
        lost = {one.id for one in wrong if one.where == "reference"}
        intact = {
            id: one for id, one in zip(sorted(reasons), references, strict=True) if one is not None and id not in lost
        }
        compute = compute and bool(intact)
        if compute:  # another model's is refused before anything is changed
            adapter, embedder = assembly.open_adapter(config), assembly.open_embedder(config)
            opened.callback(adapter.close)
            opened.callback(embedder.close)
            adapter.check(bank.manifest, bank.path)
            bank.manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=bank.path)
        apart = sorted(reasons.keys() - home.quarantined().keys())
        for id in apart:
            home.quarantine(id, reasons[id])
        recomputed = _recompute(bank, adapter, embedder, intact, config, progress) if compute else {}
        dropped = sorted(reasons.keys() - intact.keys()) if drop else []
        home.discard(as_ids(dropped))
        if any(one.where == "index" for one in found.damage):
            (bank.path / INDEX).unlink()
        index, changed = assembly.open_index(config, bank)
        if changed:
            assembly.save_index(index, bank)
    mended = {*recomputed, *dropped}
    left = tuple(one for one in found.damage if one.where != "index" and one.id not in mended)
    return RepairReport(found, tuple(apart), recomputed, tuple(dropped), left)


def _recompute(
    bank: Bank,
    adapter: Adapter,
    embedder: Embedder,
    references: Mapping[int, Reference],
    config: Config,
    progress: OnProgress | None,
) -> dict[int, int]:
    """Compute memories again, a group at a time, and forget the damaged ones in the same transaction."""
    new: dict[int, int] = {}

    def done(count: int) -> None:
        if progress:
            progress("memories", len(new) + count, len(references))

    done(0)
    old = list(references)
    for start in range(0, len(old), GROUP):
        ids = old[start : start + GROUP]
        batch = encoded(bank, adapter, embedder, [references[id] for id in ids], config.memory.batch_size, done)
        bank.home.commit(batch, replacing=as_ids(ids))
        new.update(zip(ids, batch.ids.tolist(), strict=True))
    return new
