"""`Runtime`: an open bank with its tiers, index and embedder, serving streams."""

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Self

import numpy as np
import torch

from m3runtime import assembly, records
from m3runtime.bank import Bank, as_ids
from m3runtime.block import Ids
from m3runtime.config import Config
from m3runtime.errors import BlockError, InputError
from m3runtime.hierarchy import Hierarchy
from m3runtime.metrics import RecallStats
from m3runtime.prefetch import Prefetcher
from m3runtime.retrieval import Match, Retriever, log_weights
from m3runtime.stream import Part, Recalled, Stream
from m3runtime.tier import Reference
from m3runtime.trace import TraceWriter


class Runtime:
    """Chooses and delivers memories. Every method may be called from any thread; a stream, from one at a time."""

    def __init__(
        self, config: Config, bank: Bank, hierarchy: Hierarchy, retriever: Retriever, device: torch.device
    ) -> None:
        self.config = config
        self.bank = bank
        self.hierarchy = hierarchy
        self.retriever = retriever
        self.device = device
        self.stats = RecallStats()
        self._prefetcher = Prefetcher()
        self._lifter = Prefetcher()
        self._lock = threading.Lock()
        self._closed = False
        self._index_changed = False
        self._trace: TraceWriter | None = None

    @classmethod
    def open(cls, config: Config | str | Path | None = None, *, read_only: bool = False) -> Self:
        """Open the bank that a configuration (or its file) names, with everything around it.

        Raises `ConfigError`, `PluginError`, `BankMissingError`, `BankFormatError`, `BankMismatchError` (the bank is
        another embedder's), another `BankError`, or `InputError` if it cannot record into ``recall.trace``.
        """
        config = config if isinstance(config, Config) else Config.load(config)
        with contextlib.ExitStack() as undo:
            bank = assembly.open_bank(config, read_only=read_only)
            undo.callback(bank.close)
            embedder = assembly.open_embedder(config)
            undo.callback(embedder.close)
            bank.manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=bank.path)
            device = assembly.device(config)
            tiers = assembly.open_tiers(config, bank.home.slot_bytes)
            for tier in tiers:
                undo.callback(tier.close)
            trace = None
            if config.recall.trace is not None:
                trace = TraceWriter(config.recall.trace, bank.home.slot_bytes, tiers)
                undo.callback(trace.close)
            hierarchy = Hierarchy(tiers, bank.home, bank.stamp, device, recorder=trace)
            index, changed = assembly.open_index(config, bank)
            recall = config.recall
            retriever = Retriever(
                embedder, index, memories=recall.memories, min_score=recall.min_score, margin=recall.margin
            )
            runtime = cls(config, bank, hierarchy, retriever, device)
            runtime._index_changed = changed and not read_only
            runtime._trace = trace
            undo.pop_all()
        return runtime

    # -- streams ------------------------------------------------------------------------------------------------

    def stream(self, dtype: torch.dtype | None = None) -> Stream:
        """A new stream, whose memories are decoded to ``dtype`` (default: what the model computed them in)."""
        return Stream(self, dtype or getattr(torch, self.bank.manifest.spec.dtype))

    def recall(self, streams: Sequence[Stream], texts: Sequence[str], *, wait: bool | None = None) -> list[Recalled]:
        """Recall for several streams at once: one embedding, one search, one read and one decoding for all of them.

        A blank text keeps nothing and chooses nothing. See `Stream.recall`.
        """
        if len(streams) != len(texts):
            raise InputError(f"{len(streams)} streams, but {len(texts)} texts")
        if len({stream.dtype for stream in streams}) > 1:
            raise InputError("streams that recall together must have the same dtype")
        began = time.perf_counter()
        waits = self.config.recall.when_late == "wait" if wait is None else wait
        chosen = self.retriever.search(texts)
        for stream, matches in zip(streams, chosen, strict=True):
            _add_owed(stream, matches, self.config.recall.memories)
        searched = time.perf_counter()
        # What one of the streams holds is there for all of them.
        held = {id: part for stream in streams for id, part in stream.held.items()}
        new = _unique(match.id for matches in chosen for match in matches if match.id not in held)
        late: set[int] = set()
        if not waits and len(new):
            new, late = self._await(new, searched + self.config.recall.deadline)
        fetched = self.fetch(new, streams[0].dtype if streams else torch.float32)
        self._score([match for matches in chosen for match in matches])
        parts = held | fetched
        results = [self._deliver(stream, matches, parts, late) for stream, matches in zip(streams, chosen, strict=True)]
        self.stats.count(
            chunks=len(streams),
            memories=sum(len(result) for result in results),
            kept=sum(len(result) for result in results) - len(fetched),
            late=sum(len(result.late) for result in results),
            search_s=searched - began,
            fetch_s=time.perf_counter() - searched,
        )
        return results

    def hint(self, stream: Stream, text: str) -> None:
        """See `Stream.hint`."""

        def work() -> None:
            (matches,) = self.retriever.search([text])
            self.hierarchy.lift(as_ids([match.id for match in matches]))
            self._score(matches)

        self._prefetcher.hint(id(stream), work)

    def release(self, stream: Stream) -> None:
        """See `Stream.close`."""
        if not self._closed:
            self._prefetcher.forget(id(stream))
            self.hierarchy.unpin(as_ids(list(stream.held)))
        stream.held = {}
        stream.owed = []

    # -- the bank -----------------------------------------------------------------------------------------------

    def search(self, texts: Sequence[str], k: int | None = None) -> list[list[Match]]:
        """What would be recalled for each text, best first; with ``k``, that many whatever their scores."""
        if k is None:
            return self.retriever.search(texts)
        everything = Retriever(self.retriever.embedder, self.retriever.index, memories=k)
        return everything.search(texts)

    def references(self, ids: Sequence[int]) -> list[Reference | None]:
        """The references of ids, None where an id is not remembered, or was set apart because its record is damaged."""
        found, damaged = records.references(self.bank.home, as_ids(ids))
        records.set_apart(self.bank.home, damaged)
        return found

    def fetch(self, ids: Sequence[int] | Ids, dtype: torch.dtype) -> dict[int, Part]:
        """The decoded memories of ids, on the device and in one call; those that are gone or bad are left out."""
        if not len(ids):
            return {}
        ids = as_ids(ids)
        blocks = torch.empty(len(ids), self.hierarchy.slot_bytes, dtype=torch.uint8, device=self.device)
        found = self.hierarchy.read(ids, blocks)
        if not found.all():
            blocks, ids = blocks[torch.from_numpy(found).to(self.device)], ids[found]
        if not len(ids):
            return {}
        try:
            memories = self.bank.decode(blocks, dtype)
        except BlockError as error:
            if len(ids) == 1:
                records.set_apart(self.bank.home, {int(ids[0]): str(error)})
                return {}
            return {k: v for i in range(len(ids)) for k, v in self.fetch(ids[i : i + 1], dtype).items()}
        return {
            id: (memories.keys[row, :, :, :tokens], memories.values[row, :, :, :tokens])
            for row, (id, tokens) in enumerate(zip(ids.tolist(), memories.tokens.tolist(), strict=True))
        }

    def forget(self, ids: Sequence[int]) -> int:
        """Forget references in the home, every tier and the index. Returns how many there were.

        Once the home has forgotten, nothing answers with them any more: what a crash leaves in the index or in a tier
        is removed when the bank is opened again.
        """
        wanted = as_ids(sorted(set(ids)))
        found, damaged = records.references(self.bank.home, wanted)
        self.hierarchy.discard(wanted)
        self.retriever.index.remove(wanted)
        self._index_changed = True
        return sum(one is not None for one in found) + len(damaged)

    def close(self) -> None:
        """Save the index, if it changed, and close everything. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.ExitStack() as closing:  # whatever one of them raises, the others close; the last comes first
            closing.callback(self.bank.close)
            closing.callback(self.retriever.embedder.close)
            if self._index_changed:
                closing.callback(assembly.save_index, self.retriever.index, self.bank)
            if self._trace is not None:
                closing.callback(self._trace.close)
            closing.callback(self.hierarchy.close)
            closing.callback(self._lifter.close)
            closing.callback(self._prefetcher.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- delivery -----------------------------------------------------------------------------------------------

    def _await(self, ids: Ids, deadline: float) -> tuple[Ids, set[int]]:
        """Lift in the background until the deadline. Returns the ids that have arrived, and those that have not."""
        lifted = self._lifter.hint(ids.tobytes(), lambda: self.hierarchy.lift(ids))
        try:
            lifted.result(timeout=max(0.0, deadline - time.perf_counter()))
        except (TimeoutError, CancelledError):
            there = self.hierarchy.held(ids)
        else:
            # What no caching tier had room for is read from the home: it would not come any other way.
            return ids, set()
        return ids[there], set(ids[~there].tolist())

    def _score(self, matches: Sequence[Match]) -> None:
        """Tell the tiers how well these matched, after they hold them."""
        if matches:
            scores = np.array([match.score for match in matches], np.float32)
            self.hierarchy.score(as_ids([match.id for match in matches]), scores)

    def _deliver(self, stream: Stream, matches: list[Match], parts: dict[int, Part], late: set[int]) -> Recalled:
        """Give a stream its memories, and take back those it no longer holds."""
        references = self.references([match.id for match in matches])
        held: dict[int, Part] = {}
        given: list[tuple[Match, Reference]] = []
        for match, reference in zip(matches, references, strict=True):
            part = parts.get(match.id)
            if part is not None and reference is not None:
                held[match.id] = part
                given.append((match, reference))
        self.hierarchy.pin(as_ids([id for id in held if id not in stream.held]))
        self.hierarchy.unpin(as_ids([id for id in stream.held if id not in held]))
        stream.held = held
        missed = [match for match in matches if match.id in late]
        if self.config.recall.when_late == "next_chunk":
            stream.owed = missed
        return Recalled(
            ids=tuple(match.id for match, _ in given),
            scores=tuple(match.score for match, _ in given),
            references=tuple(reference for _, reference in given),
            late=tuple(match.id for match in missed),
            spec=self.bank.manifest.spec,
            device=self.device,
            dtype=stream.dtype,
            parts=tuple(held[match.id] for match, _ in given),
            log_weights=log_weights([match for match, _ in given], self.config.recall.score_temperature),
        )


def _unique(ids: Iterable[int]) -> Ids:
    return as_ids(list(dict.fromkeys(ids)))


def _add_owed(stream: Stream, matches: list[Match], most: int) -> None:
    """Add what was late for the last chunk; the best ``most`` of both stay."""
    there = {match.id for match in matches}
    matches.extend(match for match in stream.owed if match.id not in there)
    matches.sort(key=lambda match: -match.score)
    del matches[most:]
    stream.owed = []
