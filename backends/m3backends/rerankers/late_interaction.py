"""`LateInteractionReranker`: question and text compared word by word, by an embedding model's vectors of tokens."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3backends.embedders.bert import MeanOfTokens
from m3backends.embedders.loading import check_counts, find_model, import_extra, quietly
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.retrieval.reranker import Reranker


@dataclass(frozen=True, slots=True)
class _Read:
    """A text as the model reads it."""

    tokens: npt.NDArray[np.float16]
    """``[tokens, dim]``, each row of length 1; without the special tokens at both ends."""
    whole: npt.NDArray[np.float32]
    """The embedding of the text, of length 1."""


class LateInteractionReranker(Reranker):
    """Scores by the embedder's own model, without training: the mean of two cosines.

    One is the cosine of question and text as a whole, as in a dense search. The other is the mean, over the tokens of
    the question, of the cosine of the nearest token of the text, as in ColBERT: a text that answers has a place for
    each word that was asked for, in its context. A blank question or text has no second cosine, which counts 0.

    ``path`` is a model of sentence-transformers, as a folder or a hub name: best that of the embedder. ``kept`` is the
    number of texts whose vectors stay in RAM (in float16: 100 kB for 128 tokens of 384 numbers), the last ones used.
    Each text is read alone, so scores do not depend on what was read with it.

    Thread-safe: one call at a time. Raises `PluginError` without the package, `ConfigError` for a model that is missing
    or cannot be loaded, and for a device that this machine does not have.
    """

    kind = "late-interaction"

    def __init__(self, path: str | Path, *, device: str = "cpu", kept: int = 1024) -> None:
        check_counts(self.kind, kept=kept)
        folder, device = find_model(path, self.kind), str(resolve(device, "recall.reranker.device"))
        light = MeanOfTokens.of(folder, device)
        self._read = light.tokens if light is not None else _by_library(folder, path, self.kind, device)
        self._path = path
        self._kept = kept
        self._texts = OrderedDict[str, _Read]()
        self._lock = threading.Lock()

    def score(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Numbers in [-1, 1], ``float32[n]``. Raises `ConfigError` if the model gives vectors without direction."""
        if not texts:
            return np.zeros(0, np.float32)
        with self._lock:
            asked = self._unit(question)
            return np.array([_likeness(asked, self._known(text)) for text in texts], np.float32)

    def _known(self, text: str) -> _Read:
        if text not in self._texts:
            self._texts[text] = self._unit(text)
            if len(self._texts) > self._kept:
                self._texts.popitem(last=False)
        self._texts.move_to_end(text)
        return self._texts[text]

    def _unit(self, text: str) -> _Read:
        tokens, whole = self._read(text)
        rows = np.concatenate([tokens, whole[None]])
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ConfigError(f"reranker {self.kind}: {self._path} gives vectors without direction")
        rows = rows / lengths
        return _Read(rows[1:-2].astype(np.float16), rows[-1])


def _likeness(asked: _Read, text: _Read) -> float:
    whole = float(asked.whole @ text.whole)
    if not len(asked.tokens) or not len(text.tokens):
        return whole / 2
    nearest = (asked.tokens.astype(np.float32) @ text.tokens.astype(np.float32).T).max(1)
    return (whole + float(nearest.mean())) / 2


def _by_library(
    folder: Path, path: str | Path, kind: str, device: str
) -> Callable[[str], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Read texts by a model that only the sentence-transformers library runs."""
    library = import_extra("sentence_transformers", kind)
    with quietly(path, kind):
        model = library.SentenceTransformer(str(folder), device=device, local_files_only=True)

    def read(text: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        (found,) = model.encode([text], output_value=None, show_progress_bar=False)
        return tuple(found[name].float().cpu().numpy() for name in ("token_embeddings", "sentence_embedding"))

    return read
