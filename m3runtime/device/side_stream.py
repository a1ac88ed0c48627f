"""`SideStream`: work on a GPU in parallel with the stream that decodes."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A CUDA stream for each thread that asks for one; on any other device nothing happens. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of = threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Queue the work of a ``with`` block on the calling thread's own stream."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._of, "stream"):
            self._of.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._of.stream):
            yield

    def mark(self) -> torch.Event | None:
        """An event after all that the current stream has queued so far; None on a CPU, where nothing waits."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def arrive(self, event: torch.Event | None, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for ``event``, and use these tensors from then on. The CPU does not wait."""
        if event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)  # or its memory could be given away while this stream still reads it
