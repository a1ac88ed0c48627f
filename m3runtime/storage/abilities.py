"""Optional abilities of a caching tier, each a protocol. The runtime uses an ability where a tier has it."""

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids

Scores = npt.NDArray[np.float32]


@runtime_checkable
class Persistent(Protocol):
    """A caching tier whose blocks outlive the process. One without this is empty when it is opened."""

    def ids(self) -> Ids:
        """All ids held, in any order: what was forgotten meanwhile is discarded when a hierarchy takes the tier."""


@runtime_checkable
class Scored(Protocol):
    """A caching tier whose eviction policy may look at what retrieval thought of a block."""

    def score(self, ids: Ids, scores: Scores) -> None:
        """Retrieval chose these with these scores in [-1, 1]. Ids that are not held are passed over."""
