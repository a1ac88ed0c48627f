"""`WorkerHalf`: writes memories into the slots of requests, before the forward pass that reads them."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m3model.vllm import compat
from m3model.vllm.reading import Load
from m3model.vllm.slots import Slots
from m3runtime.recall.lease import Part

if TYPE_CHECKING:
    from m3runtime.runtime import Runtime

log = logging.getLogger("m3model.vllm")


class WorkerHalf:
    """The hooks of one worker. One thread."""

    def __init__(
        self,
        shape: compat.Shape,
        make_slots: Callable[[slice, torch.dtype, torch.device], Slots],
        runtime: "Runtime | None",
    ) -> None:
        """``runtime`` has the bank open, for a worker that is not in the scheduler's process."""
        self._shape = shape
        self._make_slots = make_slots
        self._runtime = runtime
        self._slots: Slots | None = None
        self._layers: list[tuple[int, Any]] = []
        self._failed: set[int] = set()

    def load(self, loads: Sequence[Load], refused: Sequence[int], forward_context: Any) -> None:
        """Write what a step loads. What cannot be loaded ends its request, and no other."""
        self._failed.update(refused)
        for load in loads:
            try:
                self._write(load, forward_context)
            except Exception:
                log.exception("the memories %s of request %s cannot be loaded", load.memories.ids, load.request)
                self._failed.update(load.blocks[:1])

    def failed(self) -> set[int]:
        """The blocks of requests that end, since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    @torch.inference_mode()
    def _write(self, load: Load, forward_context: Any) -> None:
        slots = self._prepared(forward_context)
        recalled = load.memories
        keys, values = slots.arrange(recalled.ids, self._parts(load, slots), recalled.log_weights)
        start = 0 if load.whole else slots.sink
        at = self._places(load.blocks, start, keys.shape[1], keys.device)
        for number, layer in self._layers:
            compat.put(layer, keys[number, start:], values[number, start:], at)

    def _prepared(self, forward_context: Any) -> Slots:
        """The slots, made at the first load: only then the cache is there."""
        if self._slots is None:
            self._layers = list(compat.layers(forward_context))
            _, layer = self._layers[0]
            heads = compat.local_heads(layer, self._shape.kv_heads)
            self._slots = self._make_slots(heads, self._shape.dtype, layer.kv_cache.device)
        return self._slots

    def _parts(self, load: Load, slots: Slots) -> Sequence[Part]:
        recalled = load.memories
        if recalled.parts or not recalled.ids:
            return recalled.parts
        # Of another process: parts do not travel, and each worker reads the bank itself.
        assert self._runtime is not None
        missing = [id for id in recalled.ids if not slots.has(id)]
        parts = self._runtime.fetch(missing, self._shape.dtype) if missing else {}
        nothing = torch.empty(0)
        return [(nothing, nothing) if slots.has(id) else parts[id] for id in recalled.ids]

    def _places(self, blocks: Sequence[int], start: int, end: int, device: torch.device) -> Tensor:
        """The slots of vLLM's cache for places in the head of a prompt."""
        places = torch.arange(start, end, device=device)
        of = torch.tensor(blocks, device=device)[places // self._shape.block]
        return of * self._shape.block + places % self._shape.block
