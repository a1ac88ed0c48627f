"""`Runtime`: an open bank with its tiers, index and embedder, serving streams."""

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self

import torch

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.bank.members import Members
from m3runtime.config.schema import Config
from m3runtime.config.where import conditions
from m3runtime.device.threads import prepare
from m3runtime.documents import expiry
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankBusyError, ConfigError, ForkedError, InputError, TierError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.observe.metrics import Event, Meter, Metrics, RecallStats, TierMetrics
from m3runtime.recall.background import Background
from m3runtime.recall.cold_start import ColdStart
from m3runtime.recall.lease import Part
from m3runtime.recall.loader import Loader, part_bytes
from m3runtime.recall.memory_store import MemoryStore
from m3runtime.recall.recall import Recall
from m3runtime.recall.recalled import Recalled
from m3runtime.recall.refresh import Refresh
from m3runtime.retrieval.duplicates import Duplicates
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.naming import Naming
from m3runtime.retrieval.query import Text
from m3runtime.retrieval.reranker import Reranker
from m3runtime.retrieval.reranking import Reranking
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction
from m3runtime.retrieval.retriever import Retriever
from m3runtime.storage.defaults import default_decoded
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.tier import Tier
from m3runtime.storage.trace import TraceWriter
from m3runtime.stream import Stream
from m3runtime.writing import encoding


class Runtime:
    """Chooses and delivers memories. Thread-safe; one stream may be used by one thread at a time."""

    def __init__(
        self,
        config: Config,
        bank: Bank,
        hierarchy: Hierarchy,
        retriever: Retriever,
        device: torch.device,
        *,
        reranker: Reranker | None = None,
        encoder: Adapter | None = None,
        today: Callable[[], str] = expiry.today,
    ) -> None:
        """With ``recall.reranker``, ``reranker`` orders the first candidates of a search, and is closed in the end.

        ``encoder`` is needed to recall with ``recall.cold_start``, and may also be set later.

        ``today`` gives the date in UTC, such as ``2027-01-31``: what has expired before is not recalled.
        """
        self.config = config
        self.bank = bank
        self.hierarchy = hierarchy
        self.retriever = retriever
        retriever.members = Members(bank.home)
        self.where = conditions(config.recall.where)
        """The conditions of ``recall.where``, which every stream and search has."""
        self.device = device
        self.stats = RecallStats()
        self.meter = Meter(config.metrics.timeline)
        largest = part_bytes(bank, self._dtype)
        capacity = config.recall.decoded or max(default_decoded(device), 2 * config.recall.memories * largest)
        self.store = MemoryStore(capacity, partial(part_bytes, bank), slots=max(1, capacity // largest))
        cores = config.threads.cores or (torch.get_num_threads() if device.type == "cpu" else 1)
        self.background = Background(config.threads.lookahead, partial(prepare, device, cores))
        self._loader = Loader(bank, hierarchy, self.store, device, today)
        if config.recall.distinct:
            retriever.duplicates = Duplicates(self._loader.references)
        if config.recall.names_weight:
            retriever.naming = Naming(self._loader.references, config.recall.names_weight)
        if reranker is not None and config.recall.reranker is not None:
            retriever.reranking = Reranking(reranker, self._loader.references, config.recall.reranker.candidates)
        self._cold_start = ColdStart(bank, self.stats, is_on=config.recall.cold_start)
        self._recall = Recall(
            config.recall, retriever, self._loader, self._cold_start, self.background, self.meter, self.stats
        )
        self._refresh = Refresh(
            bank,
            retriever.indexes,
            self.store,
            hierarchy,
            config.recall.refresh,
            cold=config.recall.cold_start,
            today=today,
        )
        self._encoder: Adapter | None = None
        self.encoder = encoder
        self._numbers = count(1)
        self._dropped: deque[int] = deque()  # numbers of streams that were collected without being closed
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._index_changed = False
        self._trace: TraceWriter | None = None
        self._endpoint: contextlib.AbstractContextManager[object] | None = None

    @classmethod
    def open(
        cls,
        config: Config | str | Path | None = None,
        *,
        read_only: bool = False,
        encoder: Adapter | None = None,
        today: Callable[[], str] = expiry.today,
    ) -> Self:
        """Open the bank that a configuration (or its file) names, with its tiers, index and embedder.

        ``encoder`` encodes cold references, if ``recall.cold_start`` is on; it stays the caller's to close. With
        ``read_only`` nothing is encoded: cold references are found by `search`, and not delivered.

        Raises `ConfigError`, `PluginError`, `BankMissingError`, `BankFormatError`, `BankMismatchError` (the bank is
        another embedder's or model's), `BankBusyError`, another `BankError`, or `InputError` if it cannot record into
        ``recall.trace``.
        """
        config = config if isinstance(config, Config) else Config.load(config)
        with contextlib.ExitStack() as undo:
            bank = _open_bank(config, read_only=read_only)
            undo.callback(bank.close)
            device = assembly.device(config)
            embedder = assembly.open_embedder(config, device)
            undo.callback(embedder.close)
            reranker = assembly.open_reranker(config, device)
            if reranker is not None:
                undo.callback(reranker.close)
            bank.manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=bank.path)
            tiers = assembly.open_tiers(config, bank.slot_bytes, device, identity=bank.identity)
            for tier in tiers:
                undo.callback(tier.close)
            trace = None
            if config.recall.trace is not None:
                trace = TraceWriter(config.recall.trace, bank.slot_bytes, tiers)
                undo.callback(trace.close)
            hierarchy = Hierarchy(tiers, bank.home, bank.codecs, device, record=trace.record if trace else None)
            recall = config.recall
            hidden = records.expired(bank.home, today())
            index, changed = assembly.bank_index(config, bank).open(cold=recall.cold_start, hidden=hidden)
            lexical, lexical_changed = None, False
            if recall.search != "dense":
                lexical, lexical_changed = assembly.lexical_index(bank).open(cold=recall.cold_start, hidden=hidden)
            retriever = Retriever(
                embedder,
                index,
                lexical,
                alone=recall.search == "lexical",
                memories=recall.memories,
                min_score=recall.min_score,
                margin=recall.margin,
            )
            if read_only:
                config = config.without_cold_start()
            runtime = cls(config, bank, hierarchy, retriever, device, reranker=reranker, encoder=encoder, today=today)
            runtime._index_changed = (changed or lexical_changed) and not read_only
            runtime._trace = trace
            undo.callback(runtime._stop)
            if config.metrics.port is not None:
                from m3runtime.observe.prometheus import serve  # an optional dependency

                runtime._endpoint = serve(runtime.metrics, config.metrics.address, config.metrics.port)
            undo.pop_all()
        return runtime

    @property
    def encoder(self) -> Adapter | None:
        """The adapter that encodes cold references. Setting one raises `BankMismatchError` if the bank is another's."""
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: Adapter | None) -> None:
        if encoder is not None:
            encoder.check(self.bank.manifest, self.bank.path)
            size = self.config.memory.batch_size
            self._cold_start.encode = partial(encoding.blocks_of, self.bank, encoder, batch_size=size)
        self._encoder = encoder

    # -- streams ------------------------------------------------------------------------------------------------

    def stream(self, dtype: torch.dtype | None = None, restriction: Restriction = UNRESTRICTED) -> Stream:
        """A new stream whose memories are decoded to ``dtype`` (default: the dtype that the model computed them in).

        ``restriction`` limits which memories it may read, such as those of some sources, within ``recall.where``.

        Raises `ConfigError` if ``recall.decoded`` is too small for the memories of one chunk.
        """
        dtype = dtype or self._dtype
        if (least := self.config.recall.memories * part_bytes(self.bank, dtype)) > self.store.capacity:
            raise ConfigError(
                f"recall.decoded: {self.store.capacity} bytes do not hold the {self.config.recall.memories} memories "
                f"of one chunk; set at least {least}"
            )
        stream = Stream(self, dtype, next(self._numbers), restriction.within(self.where))
        weakref.finalize(stream, self._dropped.append, stream.number).atexit = False
        return stream

    def recall(self, streams: Sequence[Stream], texts: Sequence[Text], *, wait: bool | None = None) -> list[Recalled]:
        """Recall for several streams: one embedding, one search, one read and one decoding for all of them.

        Concurrent calls of other threads are embedded and searched in the same batch. A blank text gets no memories.
        ``wait``: wait for late blocks? Default: as ``recall.when_late`` says.

        With ``recall.cold_start`` the cold memories among the chosen are encoded first, in the calling thread; the
        deadline does not count that time. Raises `ConfigError` if there is no `encoder`, `StoreFullError` if leased
        memories leave no room and it waits, `TierError` and `BankError` of the home, and what the embedder raises.
        After an error each stream still has leases on the memories of its last recall that this one chose too.
        """
        self._check(streams, texts)
        self._cold_start.check()
        self._refresh()
        waits = self.config.recall.when_late == "wait" if wait is None else wait
        return self._recall([stream.state for stream in streams], texts, waits=waits) if streams else []

    def hint(self, streams: Sequence[Stream], texts: Sequence[Text]) -> None:
        """Prefetch for several streams, embedded, searched and read together; see `Stream.hint`.

        Raises `TierClosedError` after `close`.
        """
        self._check(streams, texts)
        if self._refresh.is_near:
            self.background.submit(self._refresh.ahead)
        self._recall.hint([stream.state for stream in streams], texts)

    def release(self, stream: Stream) -> None:
        """Release the memories of a stream and drop its hint; see `Stream.close`."""
        if os.getpid() == self._process:  # a forked process has copies, and locks that nobody opens
            self._recall.release(stream.state)

    def _check(self, streams: Sequence[Stream], texts: Sequence[Text]) -> None:
        self._check_process()
        self._end_dropped()
        if len(streams) != len(texts):
            raise InputError(f"{len(streams)} streams, but {len(texts)} texts")
        if len({stream.dtype for stream in streams}) > 1:
            raise InputError("streams that recall together must have the same dtype")

    def _check_process(self) -> None:
        """Raise `ForkedError` in a process that was forked since: it would wait for threads that it does not have."""
        if os.getpid() != self._process:
            raise ForkedError(
                "the runtime was opened before this process forked; open one in this process, or start it with spawn"
            )

    def _end_dropped(self) -> None:
        """Drop the hints of streams that were collected without being closed; their leases give themselves back."""
        while True:
            try:
                number = self._dropped.popleft()
            except IndexError:  # none is left, though there was one before another thread looked
                return
            self._recall.hints.end(number)

    # -- metrics ------------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """A snapshot of all counters and latencies."""
        self._end_dropped()
        recall, lookahead = self.meter.latencies()
        tiers = zip(self.hierarchy.stats(), self.hierarchy.latencies(), self.hierarchy.tiers, strict=True)
        return Metrics(
            recall=self.stats.snapshot(),
            lookahead=self._recall.hints.counts(),
            store=self.store.counts(),
            recall_phases=recall,
            lookahead_phases=lookahead,
            tiers=tuple(TierMetrics(stats, latency, _blocks(tier), tier.capacity) for stats, latency, tier in tiers),
        )

    def timeline(self) -> tuple[Event, ...]:
        """The last events, as many as ``metrics.timeline`` says. ``meter.timeline.note`` adds events of the caller."""
        return self.meter.timeline.events()

    # -- the bank -----------------------------------------------------------------------------------------------

    def search(
        self, texts: Sequence[Text], k: int | None = None, restriction: Restriction = UNRESTRICTED
    ) -> list[list[Match]]:
        """The matches that a recall would choose for each text, best first; with ``k``, so many whatever the scores.

        ``restriction`` is that of a stream: see `stream`.
        """
        self._check_process()
        self._refresh()
        limits = [restriction.within(self.where)] * len(texts)
        retriever = self.retriever if k is None else self.retriever.unlimited(k)
        return retriever.search(texts, restrictions=limits)

    def references(self, ids: Sequence[int]) -> list[Reference | None]:
        """The references of ids; None where an id is not remembered, or its record is damaged and now quarantined.

        Places that have expired are left out.
        """
        found = self._loader.references(ids)
        return [found.get(id) for id in ids]

    def cited(self, matches: Sequence[Match]) -> list[Reference | None]:
        """The reference of each match, with the places of those that it stands for; None where it is not remembered."""
        return self._loader.cited(matches)

    def refresh(self) -> None:
        """See now what other processes changed in the bank, whatever ``recall.refresh`` says.

        Once this has returned, recalls and searches that begin later know of every change that was committed before.
        """
        self._check_process()
        self._refresh.now()

    def fetch(self, ids: Sequence[int] | Ids, dtype: torch.dtype) -> dict[int, Part]:
        """The decoded memories of ids, on the device, without lease; forgotten, bad and cold ones are left out."""
        self._check_process()
        self._refresh()
        phases, parts = self.meter.lookahead(), dict[int, Part]()
        wanted = list(dict.fromkeys(as_ids(ids).tolist()))
        size = max(1, self.store.capacity // part_bytes(self.bank, dtype) // 2)
        for start in range(0, len(wanted), size):
            delivered = self._recall.delivery.gather(wanted[start : start + size], dtype, phases)
            parts |= {id: lease.loaded.part for id, lease in delivered.leases.items()}
            self.store.release(delivered.leases.values())
        return parts

    def forget(self, ids: Sequence[int]) -> int:
        """Forget references in the home, every tier, the store and the index. Returns how many there were.

        Once this has returned, no recall that begins later delivers them. A crash may leave them in the index or in a
        tier that outlives the process: they are removed when the bank is opened again.
        """
        self._check_process()
        wanted = as_ids(sorted(set(ids)))
        found, damaged = records.references(self.bank.home, wanted)
        self.hierarchy.discard(wanted)
        self.store.forget(wanted.tolist())
        for index in self.retriever.indexes:
            index.remove(wanted)
        self._index_changed = True
        return sum(one is not None for one in found) + len(damaged)

    def close(self) -> None:
        """Save the index, if it changed, and close everything. Closing twice is fine.

        In a process that forked since, only the bank is closed, so that this process can open it anew.
        """
        if os.getpid() != self._process:
            self.bank.close()
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.ExitStack() as closing:  # whatever one of them raises, the others close; the last comes first
            closing.callback(self.bank.close)
            closing.callback(self.retriever.embedder.close)
            if self.retriever.reranking is not None:
                closing.callback(self.retriever.reranking.reranker.close)
            if self._index_changed:
                closing.callback(self._save_indexes)
            if self._trace is not None:
                closing.callback(self._trace.close)
            closing.callback(self.hierarchy.close)
            closing.callback(self._stop)

    def _save_indexes(self) -> None:
        assembly.bank_index(self.config, self.bank).save(self.retriever.index)
        if self.retriever.lexical is not None:
            assembly.lexical_index(self.bank).save(self.retriever.lexical)

    def _stop(self) -> None:
        """End its own threads."""
        with contextlib.ExitStack() as closing:
            closing.callback(self.store.close)
            closing.callback(self.background.close)
            if self._endpoint is not None:
                closing.push(self._endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype that the model computed the memories in."""
        return getattr(torch, self.bank.manifest.spec.dtype)  # type: ignore[no-any-return]


def _open_bank(config: Config, *, read_only: bool) -> Bank:
    try:
        return assembly.open_bank(config, read_only=read_only)
    except BankBusyError as error:
        if read_only or not config.recall.cold_start:
            raise
        raise BankBusyError(f"{error} (a recall writes with recall.cold_start: true)") from error


def _blocks(tier: Tier) -> int | None:
    try:
        return len(tier)
    except TierError:  # closed, or failing just now
        return None
