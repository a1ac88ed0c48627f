"""The `Embedder` contract: texts to unit vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Embeddings = npt.NDArray[np.float32]
"""Embeddings, ``float32[n, dim]``."""


class Embedder(ABC):
    """Turns texts into unit vectors whose cosine tells how near they are. Thread-safe, deterministic."""

    @classmethod
    def dim_of(cls, path: str, options: Mapping[str, Any]) -> int | None:  # noqa: ARG003 - for those that can tell
        """The length of the vectors of a model that is not loaded, or None if it cannot be told from local files.

        ``path`` and ``options`` are those of the configuration.
        """
        return None

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of a vector."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Thirty-two hex digits: equal for embedders that give equal vectors."""

    @abstractmethod
    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``, each row of length 1."""

    @abstractmethod
    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``, each row of length 1. Models with an instruction for queries prepend it here."""

    def unknown_share(self, texts: Sequence[str]) -> float:  # noqa: ARG002 - for those that can tell
        """The share of the texts' tokens that the model does not know, such as those of a foreign script, or 0."""
        return 0.0

    def close(self) -> None:  # noqa: B027 - an embedder that holds nothing needs none
        """Give back what the embedder holds."""
