"""`CrossEncoderReranker`: any cross-encoder of the sentence-transformers library, such as BGE's rerankers."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from m3backends.embedders.loading import check_counts, find_model, import_extra, quietly
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.retrieval.reranker import Reranker


class CrossEncoderReranker(Reranker):
    """Scores by a model for sequence classification with one label, given as a folder or a hub name.

    ``device`` is a torch device or ``auto``. ``max_tokens`` cuts question and text together, the longer one first; None
    takes what the model reads.

    Thread-safe: one call at a time. Raises `PluginError` without the package, `ConfigError` for a model that is
    missing, cannot be loaded or has several labels, and for a device that this machine does not have.
    """

    kind = "cross-encoder"

    def __init__(
        self, path: str | Path, *, device: str = "cpu", batch_size: int = 16, max_tokens: int | None = None
    ) -> None:
        check_counts(self.kind, batch_size=batch_size, max_tokens=1 if max_tokens is None else max_tokens)
        folder, device = find_model(path, self.kind), str(resolve(device, "recall.reranker.device"))
        library = import_extra("sentence_transformers", self.kind)
        if not _is_cross_encoder(folder):
            raise ConfigError(
                f"reranker {self.kind}: {path} is no cross-encoder, which has one label for a pair of texts: an "
                "architecture ...ForSequenceClassification in its config.json"
            )
        with quietly(path, self.kind):
            self._model = library.CrossEncoder(str(folder), device=device, max_length=max_tokens, local_files_only=True)
        self._path = path
        self._batch_size = batch_size
        self._lock = threading.Lock()

    def score(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The logit of the label for each text, ``float32[n]``. Raises `ConfigError` if the model gives no number."""
        if not texts:
            return np.zeros(0, np.float32)
        pairs = [(question, text) for text in texts]
        with self._lock:
            # The library batches pairs of similar length and puts the scores back in order.
            scores = self._model.predict(
                pairs, batch_size=self._batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
            )
        found = np.array(scores, np.float32).reshape(len(texts))
        if not np.isfinite(found).all():
            raise ConfigError(f"reranker {self.kind}: {self._path} gives scores that are no numbers")
        return found


def _is_cross_encoder(folder: Path) -> bool:
    """Does the folder state a head of one label? The library would make one with random weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names, labels = config["architectures"], config.get("id2label", {})
        return any(name.endswith("ForSequenceClassification") for name in names) and len(labels) == 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
