"""`Runtime`: an open bank with its tiers, index and embedder, serving streams."""

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self

import numpy as np
import torch

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank, as_ids
from m3runtime.config.schema import Config
from m3runtime.device.threads import prepare
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankBusyError, InputError, TierError
from m3runtime.memory.block import Ids
from m3runtime.observe.metrics import Event, Meter, Metrics, RecallStats, Stages, TierMetrics
from m3runtime.recall.batching import Together
from m3runtime.recall.cold_start import ColdStart
from m3runtime.recall.fetching import Fetcher
from m3runtime.recall.lookahead import Hint, Lookahead
from m3runtime.recall.prefetch import Prefetcher
from m3runtime.retrieval.retriever import Match, Retriever, log_weights
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.tier import Tier
from m3runtime.storage.trace import TraceWriter
from m3runtime.stream import Part, Recalled, Stream


@dataclass(frozen=True, slots=True)
class _Request:
    """Streams that recall together, all of one dtype."""

    streams: Sequence[Stream]
    texts: Sequence[str]
    waits: bool

    @property
    def kind(self) -> tuple[torch.dtype, bool]:
        """Requests of one kind may be served together."""
        return self.streams[0].dtype, self.waits


class Runtime:
    """Chooses and delivers memories. Every method may be called from any thread; a stream, from one at a time."""

    def __init__(
        self,
        config: Config,
        bank: Bank,
        hierarchy: Hierarchy,
        retriever: Retriever,
        device: torch.device,
        *,
        encoder: Adapter | None = None,
    ) -> None:
        """``encoder`` is needed to recall with ``recall.cold_start``, and may also be set later."""
        self.config = config
        self.bank = bank
        self.hierarchy = hierarchy
        self.retriever = retriever
        self.device = device
        self.stats = RecallStats()
        self.meter = Meter(config.metrics.timeline)
        self._prefetcher = Prefetcher(
            threads=config.threads.lookahead, prepare=partial(prepare, device, config.threads.cores)
        )
        self._fetcher = Fetcher(bank, hierarchy, device)
        self._lookahead = Lookahead(
            self._fetcher,
            lambda texts, stages: self._cold_start.encoded(self.retriever.search(texts, timed=stages.stage)),
            self._prefetcher,
            self.meter,
            in_flight=config.recall.in_flight,
        )
        self._cold_start = ColdStart(bank, self._fetcher, self.stats, config)
        self.encoder = encoder
        self._together = Together(self._choose, self._bring, lambda request: request.kind)
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._closed = False
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
    ) -> Self:
        """Open the bank that a configuration (or its file) names, with everything around it.

        ``encoder`` encodes cold references, if ``recall.cold_start`` says so; it stays the caller's to close. Opened
        for reading only nothing is encoded: what is cold can be searched for, and is not delivered.

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
            bank.manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=bank.path)
            tiers = assembly.open_tiers(config, bank.home.slot_bytes, device)
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
            if read_only:
                config = config.without_cold_start()
            runtime = cls(config, bank, hierarchy, retriever, device, encoder=encoder)
            runtime._index_changed = changed and not read_only
            runtime._trace = trace
            undo.callback(runtime._stop)
            if config.metrics.port is not None:
                from m3runtime.observe.prometheus import serve  # an optional dependency

                runtime._endpoint = serve(runtime.metrics, config.metrics.address, config.metrics.port)
            undo.pop_all()
        return runtime

    @property
    def encoder(self) -> Adapter | None:
        """What encodes cold references. Setting it raises `BankMismatchError` if the bank is another model's."""
        return self._cold_start.encoder

    @encoder.setter
    def encoder(self, encoder: Adapter | None) -> None:
        if encoder is not None:
            encoder.check(self.bank.manifest, self.bank.path)
        self._cold_start.encoder = encoder

    # -- streams ------------------------------------------------------------------------------------------------

    def stream(self, dtype: torch.dtype | None = None) -> Stream:
        """A new stream, whose memories are decoded to ``dtype`` (default: what the model computed them in)."""
        return Stream(self, dtype or getattr(torch, self.bank.manifest.spec.dtype), next(self._numbers))

    def recall(self, streams: Sequence[Stream], texts: Sequence[str], *, wait: bool | None = None) -> list[Recalled]:
        """Recall for several streams at once: one embedding, one search, one read and one decoding for all of them.

        So it is for calls of several threads that come while another is being embedded. A blank text keeps nothing and
        chooses nothing. See `Stream.recall`.

        With ``recall.cold_start`` what is chosen and cold is encoded first, in the calling thread and however long it
        takes: the deadline is that of the others. Raises `ConfigError` if there is no `encoder`.
        """
        self._check(streams, texts)
        self._cold_start.check()
        if len({stream.dtype for stream in streams}) > 1:
            raise InputError("streams that recall together must have the same dtype")
        waits = self.config.recall.when_late == "wait" if wait is None else wait
        return self._together(_Request(streams, texts, waits)) if streams else []

    def hint(self, streams: Sequence[Stream], texts: Sequence[str]) -> None:
        """Hints of several streams, embedded, searched and read together. See `Stream.hint`."""
        self._check(streams, texts)
        most = self.config.recall.memories
        self._lookahead.hint(
            [
                Hint(stream.number, text, stream.dtype, frozenset(stream.held), partial(_add_owed, stream.owed, most))
                for stream, text in zip(streams, texts, strict=True)
            ]
        )

    def release(self, stream: Stream) -> None:
        """See `Stream.close`."""
        self._lookahead.forget(stream.number)
        if not self._closed:
            self.hierarchy.unpin(as_ids(list(stream.held)))
        stream.held = {}
        stream.owed = []

    # -- what it does -------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """What it did so far, counted and timed. A snapshot."""
        recall, lookahead = self.meter.latencies()
        tiers = zip(self.hierarchy.stats(), self.hierarchy.latencies(), self.hierarchy.tiers, strict=True)
        return Metrics(
            recall=self.stats.snapshot(),
            lookahead=self._lookahead.counts(),
            recall_stages=recall,
            lookahead_stages=lookahead,
            tiers=tuple(TierMetrics(stats, latency, _blocks(tier), tier.capacity) for stats, latency, tier in tiers),
        )

    def timeline(self) -> tuple[Event, ...]:
        """The last events, as many as ``metrics.timeline`` says. ``meter.timeline.note`` adds others beside them."""
        return self.meter.timeline.events()

    # -- the bank -----------------------------------------------------------------------------------------------

    def search(self, texts: Sequence[str], k: int | None = None) -> list[list[Match]]:
        """What would be recalled for each text, best first; with ``k``, that many whatever their scores."""
        if k is None:
            return self.retriever.search(texts)
        everything = Retriever(self.retriever.embedder, self.retriever.index, memories=k)
        return everything.search(texts)

    def references(self, ids: Sequence[int]) -> list[Reference | None]:
        """The references of ids, None where an id is not remembered, or was set apart because its record is damaged."""
        found = self._fetcher.references(ids)
        return [found.get(id) for id in ids]

    def fetch(self, ids: Sequence[int] | Ids, dtype: torch.dtype) -> dict[int, Part]:
        """The decoded memories of ids, on the device; those that are gone, bad or cold are left out."""
        stages = self.meter.lookahead()
        return dict(self._lookahead.gather({}, _unique(as_ids(ids).tolist()), dtype, stages, None).parts)

    def forget(self, ids: Sequence[int]) -> int:
        """Forget references in the home, every tier and the index. Returns how many there were.

        Once the home has forgotten, nothing answers with them any more: what a crash leaves in the index or in a tier
        is removed when the bank is opened again.
        """
        wanted = as_ids(sorted(set(ids)))
        found, damaged = records.references(self.bank.home, wanted)
        self.hierarchy.discard(wanted)
        self._fetcher.forget(wanted.tolist())
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
            closing.callback(self._stop)

    def _stop(self) -> None:
        """End its own threads."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._prefetcher.close)
            if self._endpoint is not None:
                closing.push(self._endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- delivery -----------------------------------------------------------------------------------------------

    def _check(self, streams: Sequence[Stream], texts: Sequence[str]) -> None:
        if len(streams) != len(texts):
            raise InputError(f"{len(streams)} streams, but {len(texts)} texts")

    def _choose(self, requests: Sequence[_Request]) -> tuple[Stages, float, list[list[Match]]]:
        """The first step of a recall: embedding and search."""
        began = time.perf_counter()
        numbers = tuple(stream.number for request in requests for stream in request.streams)
        stages = self.meter.recall(numbers)
        self._lookahead.begin(numbers)
        chosen = self.retriever.search([text for request in requests for text in request.texts], timed=stages.stage)
        return stages, began, chosen

    def _bring(
        self, requests: Sequence[_Request], found: tuple[Stages, float, list[list[Match]]]
    ) -> list[list[Recalled]]:
        """The second step: whatever it raises, nothing has changed of the streams."""
        stages, began, chosen = found
        streams = [stream for request in requests for stream in request.streams]
        dtype, waits = requests[0].kind
        for stream, matches in zip(streams, chosen, strict=True):
            _add_owed(stream.owed, self.config.recall.memories, matches)
        searched = time.perf_counter()
        # What one of the streams holds is there for all of them.
        held = {id: part for stream in streams for id, part in stream.held.items()}
        new = _unique(match.id for matches in chosen for match in matches if match.id not in held)
        of_streams = {
            stream.number: [match.id for match in matches] for stream, matches in zip(streams, chosen, strict=True)
        }
        fresh = self._cold_start.encode(new, dtype, stages)
        encoded = time.perf_counter()
        with stages.stage("bring", len(new)):
            # What took a model to make is not left out for being late.
            warmed = dict(fresh.parts)
            if fresh.ids:
                warmed |= self._lookahead.gather({}, fresh.ids, dtype, stages, None).parts
            rest = [id for id in new if id not in fresh.parts and id not in fresh.ids]
            deadline = None if waits else time.perf_counter() + self.config.recall.deadline
            gathered = self._lookahead.gather(of_streams, rest, dtype, stages, deadline)
        with stages.stage("deliver"):
            self._score([match for matches in chosen for match in matches])
            parts = {**held, **warmed, **gathered.parts}
            ids = _unique(match.id for matches in chosen for match in matches if match.id in parts)
            references = self._fetcher.references(ids, fresh=waits)
            given = [
                self._give(stream, matches, parts, references, gathered.late, stages)
                for stream, matches in zip(streams, chosen, strict=True)
            ]
        ended = time.perf_counter()
        stages.seconds["recall"] = ended - began
        self.meter.timeline.note("recall", began, ended, stages.streams, len(new))
        stages.count()
        memories = sum(map(len, given))
        self.stats.count(
            chunks=len(streams),
            memories=memories,
            kept=memories - len(gathered.parts) - len(warmed),
            late=sum(len(one.late) for one in given),
            search_s=searched - began,
            fetch_s=ended - encoded,
            waited_s=stages.seconds.get("wait", 0.0),
        )
        results = iter(given)
        return [[next(results) for _ in request.streams] for request in requests]

    def _score(self, matches: Sequence[Match]) -> None:
        """Tell the tiers how well these matched, after they hold them."""
        if matches:
            scores = np.array([match.score for match in matches], np.float32)
            self.hierarchy.score(as_ids([match.id for match in matches]), scores)

    def _give(
        self,
        stream: Stream,
        matches: list[Match],
        parts: Mapping[int, Part],
        references: Mapping[int, Reference],
        late: frozenset[int],
        stages: Stages,
    ) -> Recalled:
        """Give a stream its memories, and take back those it no longer holds."""
        given = [match for match in matches if match.id in parts and match.id in references]
        held = {match.id: parts[match.id] for match in given}
        self.hierarchy.pin(as_ids([id for id in held if id not in stream.held]))
        self.hierarchy.unpin(as_ids([id for id in stream.held if id not in held]))
        stream.held = held
        missed = [match for match in matches if match.id in late]
        stream.owed = missed if self.config.recall.when_late == "next_chunk" else []
        return Recalled(
            ids=tuple(match.id for match in given),
            scores=tuple(match.score for match in given),
            references=tuple(references[match.id] for match in given),
            late=tuple(match.id for match in missed),
            spec=self.bank.manifest.spec,
            device=self.device,
            dtype=stream.dtype,
            parts=tuple(held.values()),
            log_weights=log_weights(given, self.config.recall.score_temperature),
            stages=stages.seconds,
        )


def _open_bank(config: Config, *, read_only: bool) -> Bank:
    try:
        return assembly.open_bank(config, read_only=read_only)
    except BankBusyError as error:
        if read_only or not config.recall.cold_start:
            raise
        raise BankBusyError(f"{error} (a recall writes with recall.cold_start: true)") from error


def _unique(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _add_owed(owed: Sequence[Match], most: int, matches: list[Match]) -> None:
    """Add what was late for the last chunk; the best ``most`` of both stay."""
    there = {match.id for match in matches}
    matches.extend(match for match in owed if match.id not in there)
    matches.sort(key=lambda match: -match.score)
    del matches[most:]


def _blocks(tier: Tier) -> int | None:
    try:
        return len(tier)
    except TierError:  # closed, or failing just now
        return None
