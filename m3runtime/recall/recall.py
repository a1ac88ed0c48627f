"""`Recall`: chooses and delivers the memories of chunks. The way of a chunk reads top-down in this file."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from m3runtime.config.schema import RecallConfig
from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import Meter, Phases, RecallStats
from m3runtime.recall.background import Background
from m3runtime.recall.batching import Batched
from m3runtime.recall.cold_start import ColdStart
from m3runtime.recall.delivery import Delivered, Delivery
from m3runtime.recall.hints import Hint, Hints, with_owed
from m3runtime.recall.lease import Lease
from m3runtime.recall.loader import Loader
from m3runtime.recall.recalled import Recalled, StreamState
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.query import Text
from m3runtime.retrieval.restriction import Restriction
from m3runtime.retrieval.retriever import Retriever, log_weights


class Recall:
    """Recalls for the streams of one runtime. Thread-safe; a stream's own calls come one at a time."""

    def __init__(
        self,
        config: RecallConfig,
        retriever: Retriever,
        loader: Loader,
        cold_start: ColdStart,
        background: Background,
        meter: Meter,
        stats: RecallStats,
    ) -> None:
        self.hints = Hints(self._search_for_hints, loader, background, meter, memories=config.memories)
        self.delivery = Delivery(loader, background, meter)
        self._config = config
        self._retriever = retriever
        self._loader = loader
        self._store = loader.store
        self._cold_start = cold_start
        self._meter = meter
        self._stats = stats
        self._search = Batched(self._search_together)

    def __call__(self, streams: Sequence[StreamState], texts: Sequence[Text], *, waits: bool) -> list[Recalled]:
        """Recall for streams of one dtype; see `m3runtime.runtime.Runtime.recall`."""
        began = time.perf_counter()
        numbers = tuple(stream.number for stream in streams)
        phases = self._meter.recall(numbers)
        self.hints.begin_recall(numbers)
        found = self._search((texts, [stream.restriction for stream in streams], phases))
        most = self._config.memories
        chosen = [with_owed(matches, stream.owed, most) for stream, matches in zip(streams, found, strict=True)]
        self._release_stale(streams, chosen)
        delivered = self._gather(chosen, streams[0].dtype, phases, waits=waits)
        try:
            if waits:  # then there is time to see what another process forgot
                self._loader.forget_strangers(list(delivered.hits))
            with phases.phase("deliver"):
                recalled = self._deliver(streams, chosen, delivered, phases)
        finally:
            self._store.release([*delivered.leases.values(), *delivered.pending.values()])
        ended = time.perf_counter()
        phases.seconds["recall"] = ended - began
        self._meter.timeline.note("recall", began, ended, numbers, len(delivered.leases))
        phases.count()
        self._stats.count(
            chunks=len(streams),
            memories=sum(map(len, recalled)),
            kept=sum(id in delivered.hits for one in recalled for id in one.ids),
            late=sum(len(one.late) for one in recalled),
            waited_s=phases.seconds.get("wait", 0.0),
        )
        return recalled

    def hint(self, streams: Sequence[StreamState], texts: Sequence[Text]) -> None:
        """Prefetch what recalls by these texts would choose. Raises `TierClosedError` after the end."""
        self.hints.add(
            [
                Hint(
                    stream.number, text, stream.dtype, frozenset(stream.leases), tuple(stream.owed), stream.restriction
                )
                for stream, text in zip(streams, texts, strict=True)
            ]
        )

    def release(self, stream: StreamState) -> None:
        """Release the memories of a stream, its hint and its guesses."""
        self.hints.end(stream.number)
        self._store.release(stream.leases.values())
        stream.leases, stream.owed = {}, []

    # -- step by step ------------------------------------------------------------------------------------------

    def _search_together(
        self, requests: Sequence[tuple[Sequence[Text], Sequence[Restriction], Phases]]
    ) -> list[list[list[Match]]]:
        """Embed and search the texts of several calls at once."""
        began = time.perf_counter()
        texts = [text for texts, _, _ in requests for text in texts]
        limits = [one for _, restrictions, _ in requests for one in restrictions]
        found = iter(self._retriever.search(texts, timed=requests[0][2].phase, restrictions=limits))
        ended = time.perf_counter()
        for _, _, phases in requests[1:]:  # their threads waited for it
            phases.seconds["embed"] = ended - began
            phases.timeline.note("embed", began, ended, phases.streams)
        return [[next(found) for _ in texts] for texts, _, _ in requests]

    def _search_for_hints(self, hints: Sequence[Hint], phases: Phases) -> list[list[Match]]:
        texts, limits = [hint.text for hint in hints], [hint.restriction for hint in hints]
        return self._cold_start.without_cold(self._retriever.search(texts, timed=phases.phase, restrictions=limits))

    def _release_stale(self, streams: Sequence[StreamState], chosen: Sequence[Sequence[Match]]) -> None:
        """Release what streams read no more, so that it makes room for what they will read."""
        for stream, matches in zip(streams, chosen, strict=True):
            stale = stream.leases.keys() - {match.id for match in matches}
            self._store.release([stream.leases.pop(id) for id in stale])

    def _gather(
        self, chosen: Sequence[Sequence[Match]], dtype: torch.dtype, phases: Phases, *, waits: bool
    ) -> Delivered:
        """Lease the parts of all matches, loading what is missing."""
        ids = list(dict.fromkeys(match.id for matches in chosen for match in matches))
        encoded = self._cold_start.fill(ids, phases)
        deadline = None if waits else time.perf_counter() + self._config.deadline
        with phases.phase("bring"):
            return self.delivery.gather(ids, dtype, phases, deadline=deadline, encoded=encoded)

    def _deliver(
        self, streams: Sequence[StreamState], chosen: Sequence[list[Match]], delivered: Delivered, phases: Phases
    ) -> list[Recalled]:
        """Give each stream its memories, and leases on them in place of those of its last recall."""
        scores = {match.id: match.score for matches in chosen for match in matches}
        if scores:  # for the tiers, which hold the blocks by now
            self._loader.hierarchy.score(as_ids(list(scores)), np.array(list(scores.values()), np.float32))
        live = {id for id, lease in delivered.leases.items() if lease.entry.state == "ready"}  # not forgotten since
        return [
            self._give(
                stream,
                [match for match in matches if match.id in live and _may_read(stream, delivered.leases[match.id])],
                [match for match in matches if match.id in delivered.late],
                delivered,
                phases,
            )
            for stream, matches in zip(streams, chosen, strict=True)
        ]

    def _give(
        self, stream: StreamState, given: list[Match], late: list[Match], delivered: Delivered, phases: Phases
    ) -> Recalled:
        leases = [delivered.leases[match.id] for match in given]
        old = stream.leases
        stream.leases = {lease.id: lease for lease in self._store.share(leases)}
        self._store.release(old.values())
        stream.owed = late if self._config.when_late == "next_chunk" else []
        ids, late_ids = tuple(match.id for match in given), tuple(match.id for match in late)
        loading = [delivered.pending[id] for id in late_ids if id in delivered.pending]
        self.hints.end_recall(stream.number, chosen=[*ids, *late_ids], late=loading)
        bank = self._loader.bank
        others = [id for match in given for id in match.stands_for]
        same = self._loader.references(others) if others else {}
        return Recalled(
            ids=ids,
            scores=tuple(match.score for match in given),
            references=tuple(
                lease.loaded.reference.joined([same[id] for id in match.stands_for if id in same])
                for lease, match in zip(leases, given, strict=True)
            ),
            late=late_ids,
            spec=bank.manifest.spec,
            device=self._loader.device,
            dtype=stream.dtype,
            parts=tuple(lease.loaded.part for lease in leases),
            tokens=sum(lease.loaded.part[0].shape[2] for lease in leases),
            log_weights=log_weights(given, self._config.score_temperature),
            phases=phases.seconds,
        )


def _may_read(stream: StreamState, lease: Lease) -> bool:
    """Has the memory a place that the stream may read? The place that the search knew may have expired since."""
    return any(map(stream.restriction.allows, lease.loaded.reference.places))
