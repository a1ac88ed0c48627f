"""The `Reranker` contract: how well texts answer a question."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Reranker(ABC):
    """Reads a question together with each text, and judges how well the text answers it. Thread-safe, deterministic.

    It reads far more slowly than an index searches, so it only sees the first candidates of a search. Called by the
    threads that recall and that follow hints.
    """

    @abstractmethod
    def score(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """``float32[n]``: a finite number for each text, higher for one that answers better.

        It depends on the question and on this text alone. Texts that are longer than the model reads are cut.
        """

    def close(self) -> None:  # noqa: B027 - a reranker that holds nothing needs none
        """Give back what the reranker holds."""
