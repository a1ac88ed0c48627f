"""`Residency`: when to map a file anew, so that the pages of it that were touched do not count as memory any longer.

A page of a mapped file stays in the memory of the process after it was read. The kernel takes it back when it needs
room, but a monitor counts it until then: a process that writes a gigabyte seems to need it.
"""

import mmap
import os

MOST = 16 << 20
"""Bytes of mapped files that may come into memory before the file is mapped anew."""


class Residency:
    """Watches how much of all mapped files is in this process's memory. On Linux; elsewhere it never grows.

    Thread-safe: threads that look at once may map the file once too often.
    """

    def __init__(self) -> None:
        self._before = _mapped_bytes()

    def is_high(self) -> bool:
        """Have more than `MOST` bytes come into memory since `reset`? Takes some microseconds."""
        return _mapped_bytes() - self._before > MOST

    def reset(self) -> None:
        """Count from now on."""
        self._before = _mapped_bytes()


def _mapped_bytes() -> int:
    """Bytes of mapped files in memory; 0 where the system does not tell."""
    try:
        handle = os.open("/proc/self/statm", os.O_RDONLY)  # of this process also after a fork
    except OSError:
        return 0
    try:
        return int(os.read(handle, 256).split()[2]) * mmap.PAGESIZE
    finally:
        os.close(handle)
