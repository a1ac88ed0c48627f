"""`repair`: makes a damaged bank sound again, from the texts in it."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank, home_folder
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError, RecordError
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.embedder import Embedder
from m3runtime.storage.home import Home
from m3runtime.writing import erasure
from m3runtime.writing.encoding import GROUP, Group
from m3runtime.writing.verification import OnProgress, VerifyReport, examine

log = logging.getLogger("m3runtime")


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The findings and deeds of `repair`."""

    found: VerifyReport
    left: VerifyReport
    """The report of the verification afterwards."""
    quarantined: tuple[int, ...] = ()
    """Memories that were quarantined before anything else."""
    recomputed: Mapping[int, int] = field(default_factory=dict)
    """Maps the old id of each memory that was computed again to its new one."""
    dropped: tuple[int, ...] = ()
    """Memories that were forgotten because their text cannot be read any more."""


def repair(
    config: Config, *, compute: bool = True, drop: bool = False, progress: OnProgress | None = None
) -> RepairReport:
    """Verify a bank, repair its damage, and verify it again if there was any.

    Damaged memories are quarantined first, so that nothing recalls them. With ``compute`` memories with an intact
    reference are computed again, by the bank's own model and under new ids; with ``drop`` the others are forgotten. No
    readable text is forgotten. If manifest or codec is damaged, nothing can be repaired and nothing is changed. A call
    can be stopped at any instant and repeated.

    Raises `BankBusyError` if the bank is open for writing already, and `BankMismatchError`, before anything is
    changed, if the configured model or embedder is not the bank's.
    """
    with assembly.open_home(config)(path=home_folder(config.bank)) as home:
        _rewrite_quarantine(home)
        found = examine(config, home, progress)
        if any(one.where in ("manifest", "codec") for one in found.damage):
            return RepairReport(found, found)
        manifest = Manifest.read(config.bank, home)
        bank = Bank.over(config.bank, home, manifest, partial(assembly.load_codec, config))
        report = _Repair(config, bank, progress).mend(found, compute=compute, drop=drop)
        index = assembly.bank_index(config, bank)
        if any(one.where == "index" for one in found.damage):
            index.path.unlink()
        assembly.update_indexes(config, bank)
        erasure.finish_begun(config, bank)
        if found.clean:
            return report

        def again(title: str, done: int, total: int) -> None:
            if progress:
                progress(f"{title} again", done, total)

        return replace(report, left=examine(config, home, again))


def _rewrite_quarantine(home: Home) -> None:
    """Write damaged records of quarantined memories anew: they hide the others."""
    last = None
    while True:
        try:
            home.quarantined()
            return
        except RecordError as error:
            if error.id in (None, last):
                return
            last = error.id
            home.quarantine(last, "the reason was lost")


class _Repair:
    """Repairs the memories of one bank."""

    def __init__(self, config: Config, bank: Bank, progress: OnProgress | None) -> None:
        self.config = config
        self.bank = bank
        self.progress = progress
        self.recomputed: dict[int, int] = {}

    def mend(self, found: VerifyReport, *, compute: bool, drop: bool) -> RepairReport:
        """Quarantine damaged memories, then compute or forget them."""
        home = self.bank.home
        damaged = {one.id: f"{one.where}: {one.what}" for one in found.damage if one.where != "index"}
        ids = sorted(id for id in damaged if id is not None)
        references, _ = records.references(home, as_ids(ids))
        intact = {id: one for id, one in zip(ids, references, strict=True) if one is not None}
        with ExitStack() as opened:
            if compute and intact:  # another model's is refused before anything is changed
                adapter, embedder = assembly.open_adapter(self.config), assembly.open_embedder(self.config)
                opened.callback(adapter.close)
                opened.callback(embedder.close)
                adapter.check(self.bank.manifest, self.bank.path)
                self.bank.manifest.check_embedder(
                    embedder=embedder.fingerprint, name=self.config.embedder.path, where=self.bank.path
                )
            before = records.quarantined(home).keys()
            for id in ids:
                if id not in before:
                    home.quarantine(id, damaged[id])
            apart = sorted(records.quarantined(home).keys() - before)
            if compute and intact:
                for start in range(0, len(intact), GROUP):
                    self._compute(adapter, embedder, dict(list(intact.items())[start : start + GROUP]), len(intact))
        dropped = [id for id in ids if id not in intact] if drop else []
        home.discard(as_ids(dropped))
        return RepairReport(found, found, tuple(apart), self.recomputed, tuple(dropped))

    def _compute(self, adapter: Adapter, embedder: Embedder, group: Mapping[int, Reference], total: int) -> None:
        """Compute memories again, and forget the damaged ones in the transaction that adds the new."""

        def done(count: int) -> None:
            if self.progress:
                self.progress("Computing memories again", len(self.recomputed) + count, total)

        done(0)
        try:
            first = self.bank.home.reserve(len(group))
            new = Group(self.bank, as_ids(range(first, first + len(group))), list(group.values()))
            new.encode(adapter, self.config.memory.batch_size, done)
            new.embed(embedder)
            self.bank.home.commit(new.batch(), replacing=as_ids(list(group)))
            self.recomputed.update(zip(group, new.ids.tolist(), strict=True))
        except InputError as error:  # a text that is no reference, or is another memory's too
            if len(group) == 1:
                log.warning("memory %d cannot be computed again: %s", *group, error)
                return
            for id, reference in group.items():
                self._compute(adapter, embedder, {id: reference}, total)
