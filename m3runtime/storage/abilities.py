"""Optional abilities of a caching tier, each a protocol. The runtime uses an ability where a tier has it."""

from typing import Protocol, runtime_checkable

from m3runtime.memory.block import Ids


@runtime_checkable
class Persistent(Protocol):
    """A caching tier whose blocks outlive the process. One without this is empty when it is opened.

    After `Tier.discard` no file of it has bytes of these blocks. `m3 compact` relies on that.
    """

    def ids(self) -> Ids:
        """All ids held, in any order. A hierarchy discards those that the home has forgotten when it takes the tier."""
