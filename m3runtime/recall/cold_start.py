"""`ColdStart`: encodes cold references at their first recall, and stores them (Memory³, section 7.5)."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFullError, CodecError, ConfigError, InputError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.observe.metrics import RecallStats, Stages
from m3runtime.recall.fetching import Fetcher
from m3runtime.retrieval.retriever import Match
from m3runtime.stream import Part
from m3runtime.writing import encoding

log = logging.getLogger("m3runtime")

_UNSTORED = 256
"""Blocks that the home has no room for and that are kept in RAM, so that their references are not read each time."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """What was cold when a recall came."""

    ids: tuple[int, ...] = ()
    """Those that the home has now, and perhaps some that could not be encoded."""
    parts: Mapping[int, Part] = field(default_factory=dict)
    """Those that it has no room for, decoded."""


class ColdStart:
    """Encodes what recalls chose and the home has only in its catalogue, if ``recall.cold_start`` says so.

    It does so in the thread that recalls, one call of the model at a time: what another thread is encoding is waited
    for, and not encoded again. A reference that the model refuses is quarantined, and recall goes on without it. What
    the home has no room for is given to the streams all the same, and stored once there is room. Thread-safe.
    """

    def __init__(self, bank: Bank, fetcher: Fetcher, stats: RecallStats, config: Config) -> None:
        self.encoder: Adapter | None = None
        """What encodes; see `check`."""
        self._on = config.recall.cold_start
        self._batch_size = config.memory.batch_size
        self._bank = bank
        self._fetcher = fetcher
        self._stats = stats
        self._lock = threading.Lock()
        self._unstored: OrderedDict[int, Tensor] = OrderedDict()  # under the lock

    def check(self) -> None:
        """Raise `ConfigError` if there is nothing that encodes, and something should."""
        if self._on and self.encoder is None:
            raise ConfigError(
                "recall.cold_start: true needs a model that encodes; open the runtime with "
                "`Runtime.open(config, encoder=adapter)`, or set it to false"
            )

    def encoded(self, chosen: list[list[Match]]) -> list[list[Match]]:
        """Of what hints chose, what needs no model: the threads of a runtime run none."""
        if not self._on:
            return chosen
        cold = set(self._bank.home.cold(as_ids([match.id for matches in chosen for match in matches])).tolist())
        return [[match for match in matches if match.id not in cold] for matches in chosen]

    def encode(self, ids: Sequence[int], dtype: torch.dtype, stages: Stages) -> Fresh:
        """Encode and store those of ``ids`` that are cold. Raises what the model or the home raises."""
        if not (self._on and ids) or self.encoder is None:
            return Fresh()
        if not len(cold := self._bank.home.cold(as_ids(ids))):
            return Fresh()
        with stages.stage("encode", len(cold)), self._lock, torch.inference_mode(False), torch.no_grad():
            still = self._bank.home.cold(cold)  # another thread may have had the lock
            parts = self._store(still, self.encoder, dtype)
        return Fresh(tuple(id for id in cold.tolist() if id not in parts), parts)

    def _store(self, cold: Ids, encoder: Adapter, dtype: torch.dtype) -> dict[int, Part]:
        """Encode and store these. Returns the parts of those that there was no room for."""
        kept = {id: self._unstored[id] for id in cold.tolist() if id in self._unstored}
        missing = as_ids([id for id in cold.tolist() if id not in kept])
        began = time.perf_counter()
        new = self._encode(self._references(missing), encoder)
        self._stats.count(encoded=len(new), encode_s=time.perf_counter() - began)
        blocks = {**kept, **new}
        if not blocks:
            return {}
        ids, rows = as_ids(list(blocks)), torch.stack(list(blocks.values()))
        try:
            self._bank.home.fill(ids, rows)
        except BankFullError as error:
            log.warning("%d memories encoded at recall could not be stored: %s", len(blocks), error)
            self._stats.count(unstored=len(new))
            self._keep(new)
            return self._parts(ids, rows, dtype)
        for id in blocks:
            self._unstored.pop(id, None)
        return {}

    def _references(self, ids: Ids) -> dict[int, Reference]:
        found, damaged = records.references(self._bank.home, ids)
        records.set_apart(self._bank.home, damaged)
        return {id: one for id, one in zip(ids.tolist(), found, strict=True) if one is not None}

    def _encode(self, references: Mapping[int, Reference], encoder: Adapter) -> dict[int, Tensor]:
        """The block of each reference; those that the model refuses are quarantined."""
        if not references:
            return {}
        ids, texts = as_ids(list(references)), list(references.values())
        try:
            rows = encoding.blocks_of(self._bank, encoder, ids, texts, self._batch_size)
            return dict(zip(references, rows, strict=True))
        except (InputError, CodecError) as error:
            if len(references) > 1:
                ones = (self._encode({id: one}, encoder) for id, one in references.items())
                return {id: block for some in ones for id, block in some.items()}
            records.set_apart(self._bank.home, {int(ids[0]): f"it cannot be encoded: {error}"})
            return {}

    def _keep(self, blocks: Mapping[int, Tensor]) -> None:
        self._unstored.update({id: block.clone() for id, block in blocks.items()})  # not all rows of a batch
        while len(self._unstored) > _UNSTORED:
            self._unstored.popitem(last=False)

    def _parts(self, ids: Ids, rows: Tensor, dtype: torch.dtype) -> dict[int, Part]:
        """Decoded as the fetcher would have if the home had them."""
        parts: dict[int, Part] = {}
        for start in range(0, len(ids), self._fetcher.at_once):
            some = slice(start, start + self._fetcher.at_once)
            decoded = self._fetcher.decode(ids[some], rows[some].to(self._fetcher.device), dtype)
            parts |= {id: part for id, part in decoded.items() if part is not None}
        return parts
