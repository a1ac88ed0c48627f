"""`SentenceTransformersEmbedder`: any model of the sentence-transformers library."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3backends.embedders import loading as embedding
from m3runtime.retrieval.embedder import Embedder, Embeddings

KIND = "sentence-transformers"


class SentenceTransformersEmbedder(Embedder):
    """Embeds with a sentence-transformers model, given as a folder or a hub name.

    ``device`` is a torch device or ``auto``. ``query_prompt`` and ``reference_prompt`` are put before every
    text; None takes the model's own prompts, if it has any. Texts beyond the model's longest are cut at
    their end.

    Thread-safe: one call at a time. Raises `PluginError` without the package, `ConfigError` for a model
    that is not there or cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        query_prompt: str | None = None,
        reference_prompt: str | None = None,
    ) -> None:
        embedding.check_counts(KIND, batch_size=batch_size)
        folder, device = embedding.find_model(path, KIND), embedding.find_device(device)
        library = embedding.import_extra("sentence_transformers", KIND)
        with embedding.loading(path, KIND):
            self._model = library.SentenceTransformer(str(folder), device=device, local_files_only=True)
            self._dim = len(self._model.encode("dim", show_progress_bar=False))
        self._batch_size = batch_size
        self._prompts = {"query": query_prompt, "reference": reference_prompt}
        self._lock = threading.Lock()
        self._fingerprint = embedding.fingerprint(
            self._model.named_parameters(), self._model.tokenizer, self._settings()
        )

    def _settings(self) -> dict[str, Any]:
        # The first module is the transformer, whose own settings change names with releases; what matters
        # of them shows in the weights, the tokenizer and the longest text.
        steps = [[type(step).__name__, step.get_config_dict()] for step in list(self._model)[1:]]
        return {
            "steps": steps,
            "longest": self._model.max_seq_length,
            "model_prompts": {name: text for name, text in self._model.prompts.items() if text},
            "default_prompt": self._model.default_prompt_name,
            "prompts": self._prompts,
        }

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Thirty-two hex digits over weights, tokenizer, pooling, prompts and longest text."""
        return self._fingerprint

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1, with the prompt for references."""
        return self._embed(self._model.encode_document, texts, self._prompts["reference"])

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1, with the prompt for queries."""
        return self._embed(self._model.encode_query, texts, self._prompts["query"])

    def _embed(self, encode: Any, texts: Sequence[str], prompt: str | None) -> Embeddings:
        if not texts:
            return np.zeros((0, self._dim), np.float32)
        with self._lock:
            # The library batches texts of similar length and puts the rows back in order.
            rows = encode(list(texts), prompt=prompt, batch_size=self._batch_size, show_progress_bar=False)
        return embedding.unit_rows(rows, self._dim, KIND)
