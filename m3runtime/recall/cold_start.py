"""`ColdStart`: encodes cold references at their first recall, and stores them (Memory³, section 7.5)."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFullError, CodecError, ConfigError, InputError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.observe.metrics import Phases, RecallStats
from m3runtime.retrieval.match import Match

log = logging.getLogger("m3runtime")

Encode = Callable[[Ids, Sequence[Reference]], Tensor]
"""Computes and seals the blocks of references under these ids, ``uint8[n, slot_bytes]`` on the CPU."""

_UNSTORED_BYTES = 64 * 1024**2
"""Bytes of blocks kept in RAM that the home has no room for, so that not every recall encodes their references."""


class ColdStart:
    """Encodes what recalls chose and the home holds only in its catalogue. Does nothing unless ``is_on``.

    It runs in the thread that recalls, one call of the model at a time: a thread waits for what another one encodes. A
    reference that the model refuses is quarantined, and the recall goes on without it. Thread-safe.
    """

    def __init__(self, bank: Bank, stats: RecallStats, *, is_on: bool) -> None:
        self.encode: Encode | None = None
        """The model's encoding; None until there is a model."""
        self._is_on = is_on
        self._bank = bank
        self._stats = stats
        self._lock = threading.Lock()
        self._unstored: OrderedDict[int, Tensor] = OrderedDict()  # under the lock

    def check(self) -> None:
        """Raise `ConfigError` if it is on and there is no model."""
        if self._is_on and self.encode is None:
            raise ConfigError(
                "recall.cold_start: true needs a model that encodes; open the runtime with "
                "`Runtime.open(config, encoder=adapter)`, or set it to false"
            )

    def without_cold(self, chosen: list[list[Match]]) -> list[list[Match]]:
        """The matches that need no model: hints are followed by threads that run none."""
        if not self._is_on:
            return chosen
        cold = set(self._bank.home.cold(as_ids([match.id for matches in chosen for match in matches])).tolist())
        return [[match for match in matches if match.id not in cold] for matches in chosen]

    def fill(self, ids: Sequence[int], phases: Phases) -> Mapping[int, Tensor | None]:
        """Encode and store the cold ones of ``ids``.

        Maps each id that was cold to None, or to its block if the home has no room for it. Raises what the model or
        the home raises.
        """
        if not (self._is_on and ids) or self.encode is None or not len(cold := self._bank.home.cold(as_ids(ids))):
            return {}
        with phases.phase("encode", len(cold)), self._lock, torch.inference_mode(False), torch.no_grad():
            still = self._bank.home.cold(cold)  # another thread may have had the lock
            return {**dict.fromkeys(cold.tolist()), **self._store(still, self.encode)}

    def _store(self, cold: Ids, encode: Encode) -> dict[int, Tensor]:
        """Encode and store these. Returns the blocks without room in the home."""
        kept = {id: self._unstored[id] for id in cold.tolist() if id in self._unstored}
        began = time.perf_counter()
        new = self._encode(self._references(as_ids([id for id in cold.tolist() if id not in kept])), encode)
        self._stats.count(encoded=len(new), encode_s=time.perf_counter() - began)
        blocks = {**kept, **new}
        if not blocks:
            return {}
        try:
            self._bank.home.fill(as_ids(list(blocks)), torch.stack(list(blocks.values())))
        except BankFullError as error:
            log.warning("%d memories encoded at recall could not be stored: %s", len(blocks), error)
            self._stats.count(unstored=len(new))
            self._unstored.update({id: block.clone() for id, block in new.items()})  # a view keeps its whole batch
            while len(self._unstored) * self._bank.home.slot_bytes > _UNSTORED_BYTES:
                self._unstored.popitem(last=False)
            return blocks
        for id in blocks:
            self._unstored.pop(id, None)
        return {}

    def _references(self, ids: Ids) -> dict[int, Reference]:
        found, damaged = records.references(self._bank.home, ids)
        records.set_apart(self._bank.home, damaged)
        return {id: one for id, one in zip(ids.tolist(), found, strict=True) if one is not None}

    def _encode(self, references: Mapping[int, Reference], encode: Encode) -> dict[int, Tensor]:
        """The block of each reference. References that the model refuses are quarantined."""
        if not references:
            return {}
        ids, texts = as_ids(list(references)), list(references.values())
        try:
            return dict(zip(references, encode(ids, texts), strict=True))
        except (InputError, CodecError) as error:
            if len(references) > 1:
                singles = (self._encode({id: one}, encode) for id, one in references.items())
                return {id: block for single in singles for id, block in single.items()}
            records.set_apart(self._bank.home, {int(ids[0]): f"it cannot be encoded: {error}"})
            return {}
