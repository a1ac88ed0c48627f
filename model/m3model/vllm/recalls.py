"""`Recalls`: recalls for requests of vLLM, in threads of their own, those of one step together."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from m3model.engine.recalls import Asking, recall
from m3runtime.device.threads import prepare
from m3runtime.errors import InputError
from m3runtime.recall.recalled import Recalled

if TYPE_CHECKING:
    from m3runtime.runtime import Runtime
    from m3runtime.stream import Stream

_THREADS = 4

Memories = Future[Recalled]
"""What a request is to read, once it is there."""


@dataclass(frozen=True, slots=True)
class _Question:
    stream: "Stream"
    text: str
    wait: bool | None
    memories: Memories


class Recalls:
    """Recalls for one scheduler. `ask` and `name` return at once; `send` begins what was asked since."""

    def __init__(self, runtime: "Runtime", dtype: torch.dtype) -> None:
        """``dtype`` is that of memories which requests name."""
        self.runtime = runtime
        self._dtype = dtype
        self._threads = ThreadPoolExecutor(
            _THREADS, "m3-vllm-recall", partial(prepare, runtime.device, runtime.config.threads.cores or 1)
        )
        self._asked: list[_Question] = []

    def ask(self, stream: "Stream", text: str, *, wait: bool | None) -> Memories:
        """Recall by a text. ``wait``: wait for late memories? None: as ``recall.when_late`` says."""
        question = _Question(stream, text, wait, Future())
        self._asked.append(question)
        return question.memories

    def name(self, ids: Sequence[int], log_weights: Sequence[float]) -> Memories:
        """Memories by their ids. `InputError` names one that is not in the bank, or cannot be read."""
        return self._threads.submit(self._named, tuple(ids), tuple(log_weights))

    def forget(self, memories: Memories) -> None:
        """Do not begin what was asked and nobody waits for any more."""
        kept = [one for one in self._asked if one.memories is not memories]
        if len(kept) < len(self._asked):
            self._asked = kept
            memories.cancel()

    def send(self) -> None:
        """Begin all that was asked, in one batch."""
        asked, self._asked = self._asked, []
        if asked:
            self._threads.submit(self._recall, asked)

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    @torch.inference_mode()
    def _recall(self, asked: Sequence[_Question]) -> None:
        try:
            asking = [Asking(one.memories, one.stream, one.text, one.wait) for one in asked]
            recalled = recall(asking)
            self._arrive()  # before anybody hears of them
            for found in recalled:
                if isinstance(found.recalled, Exception):
                    found.who.set_exception(found.recalled)
                else:
                    found.who.set_result(found.recalled)
        except BaseException as error:
            for one in asked:
                if not one.memories.done():
                    one.memories.set_exception(error)
            raise

    @torch.inference_mode()
    def _named(self, ids: tuple[int, ...], log_weights: tuple[float, ...]) -> Recalled:
        runtime = self.runtime
        references = runtime.references(ids)
        parts = runtime.fetch(ids, self._dtype) if ids else {}
        for id, reference in zip(ids, references, strict=True):
            if reference is None:
                raise InputError(f"kv_transfer_params.m3.ids: there is no memory {id} in this bank")
            if id not in parts:
                raise InputError(f"kv_transfer_params.m3.ids: memory {id} is damaged, or not encoded yet")
        self._arrive()
        return Recalled(
            ids=ids,
            scores=(0.0,) * len(ids),
            references=tuple(one for one in references if one is not None),
            late=(),
            spec=runtime.bank.manifest.spec,
            device=runtime.device,
            dtype=self._dtype,
            parts=tuple(parts[id] for id in ids),
            tokens=sum(parts[id][0].shape[2] for id in ids),
            log_weights=log_weights or (0.0,) * len(ids),
        )

    def _arrive(self) -> None:
        """Wait for the device: the worker reads the parts on another stream of it."""
        if self.runtime.device.type == "cuda":
            torch.cuda.current_stream(self.runtime.device).synchronize()


def fitting(recalled: Recalled, slots: int) -> Recalled:
    """As many memories, best first, as there are slots for their tokens."""
    room, count = slots, 0
    for keys, _ in recalled.parts:
        room -= keys.shape[2]
        if room < 0:
            break
        count += 1
    if count == len(recalled):
        return recalled
    fields = ("ids", "scores", "references", "parts", "log_weights")
    kept = {name: getattr(recalled, name)[:count] for name in fields}
    return replace(recalled, **kept, tokens=sum(keys.shape[2] for keys, _ in kept["parts"]))
