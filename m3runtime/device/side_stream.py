"""`SideStream`: work on a GPU beside the stream that decodes."""

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
        """Let the block queue its work on the calling thread's stream."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._of, "stream"):
            self._of.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._of.stream):
            yield

    def mark(self) -> torch.Event | None:
        """What has been queued so far on the current stream, to be waited for by another; None if nothing waits."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def arrive(self, event: torch.Event | None, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait until ``event``, and use these tensors from then on. The CPU does not wait."""
        if event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)  # or its memory could be given away while this stream still reads it
