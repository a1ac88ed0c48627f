"""Copies of rows between devices, and the order among those that are under way."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def copy_rows(target: Tensor, into: Sequence[int], source: Tensor, of: Sequence[int]) -> None:
    """``target[into[i]] = source[of[i]]`` for all ``i``, with one copy of each row between any two devices.

    On an accelerator the copies are queued on the current stream, and page-locked RAM is read in the background. No
    index tensor is made, since a copy of one to the device would wait for all that is queued there.
    """
    if into:
        torch._foreach_copy_([target[row] for row in into], [source[row] for row in of], non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """``x`` on the CPU, out of an accelerator by way of page-locked RAM, at its full speed. Waits for no other stream.

    That RAM is torch's to reuse when the result is gone, so the result is for the moment.
    """
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host


class Copies:
    """Events of the copies that are under way into and out of the slots of a slab. Its owner holds a lock.

    Streams wait for each other by these events, so that a slot is not read before it is filled, and not filled again
    while it is being read. The CPU waits only in `finish`.
    """

    def __init__(self) -> None:
        self._fills: dict[int, torch.Event] = {}
        self._reads: dict[int, list[torch.Event]] = {}

    def before_read(self, slots: Iterable[int], stream: torch.Stream) -> None:
        """Let ``stream`` wait until these slots are filled."""
        self._wait(stream, {self._fills[slot] for slot in slots if slot in self._fills})

    def before_write(self, slots: Iterable[int], stream: torch.Stream) -> None:
        """Let ``stream`` wait until these slots are filled and read by all who began to."""
        waiting = set[torch.Event]()
        for slot in slots:
            waiting.update(self._reads.pop(slot, ()))
            if slot in self._fills:
                waiting.add(self._fills.pop(slot))
        self._wait(stream, waiting)

    def read(self, slots: Iterable[int], event: torch.Event) -> None:
        """Copies out of these slots end at ``event``."""
        for slot in slots:
            self._reads[slot] = [*(each for each in self._reads.get(slot, ()) if not each.query()), event]

    def filled(self, slots: Iterable[int], event: torch.Event) -> None:
        """Copies into these slots end at ``event``."""
        self._fills.update(dict.fromkeys(slots, event))

    def is_idle(self, slot: int) -> bool:
        """Is no copy out of this slot under way? Then the CPU may write to it."""
        return all(event.query() for event in self._reads.get(slot, ()))

    def finish(self) -> None:
        """Wait until all copies have ended."""
        for event in {*self._fills.values(), *(event for events in self._reads.values() for event in events)}:
            event.synchronize()
        self._fills.clear()
        self._reads.clear()

    @staticmethod
    def _wait(stream: torch.Stream, events: Iterable[torch.Event]) -> None:
        for event in events:
            if not event.query():
                stream.wait_event(event)
