"""`PageLocked`: RAM of an exact size that a CUDA device reads at full speed."""

import mmap
import sys
from contextlib import suppress

import torch


class PageLocked:
    """``size`` bytes of RAM, locked for copies to and from ``device``, as the tensor ``bytes`` (``uint8[size]``).

    torch rounds its own page-locked allocations up to a power of two, 5 GiB to 8. This memory is allocated plainly and
    then registered, so that it takes no more than whole pages. Raises `RuntimeError` or `OSError` if the machine does
    not have so much to lock.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        # Outside of inference mode, where the tensor could be written in that mode alone.
        with torch.inference_mode(False):
            if size:
                self.bytes = torch.frombuffer(_mapped(size), dtype=torch.uint8)
            else:
                self.bytes = torch.empty(0, dtype=torch.uint8)
        self._is_registered = False
        if size:
            with torch.cuda.device(device):
                result = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0)
                torch.cuda.check_error(int(result))
            self._is_registered = True

    def close(self) -> None:
        """Unlock the memory. No copy from or to it may be under way. Closing twice is fine."""
        if self._is_registered:
            self._is_registered = False
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


def _mapped(size: int) -> mmap.mmap:
    """Memory that begins with a page and is given back with the last tensor over it."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
    return memory
