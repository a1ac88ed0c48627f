"""`Compiled`: a function that is compiled when it is first called, or runs as it is."""

import logging
from typing import Any

import torch

log = logging.getLogger("m3runtime")


class Compiled:
    """A function that is compiled when it is first called, or runs as it is, with a warning, if that fails then.

    What is compiled later, a backward pass or for other shapes, has no such way out.
    """

    def __init__(self, plain: Any, backend: Any, slower: str, *, dynamic: bool | None = None) -> None:
        """``backend`` and ``dynamic`` are those of `torch.compile`; ``slower`` is what is slower without."""
        self._plain = plain
        self._compiled: Any = torch.compile(plain, backend=backend, dynamic=dynamic)
        self._slower = slower
        self._works = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if self._works:
            return self._compiled(*args, **kwargs)
        try:
            found = self._compiled(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - of many types; and if it is not the compiler's, it comes again
            log.warning("%s is slower, for it cannot be compiled: %s: %s", self._slower, type(error).__name__, error)
            self._compiled = self._plain
            found = self._plain(*args, **kwargs)
        self._works = True
        return found
