"""`SentenceTransformersEmbedder`: any model of the sentence-transformers library."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m3backends.embedders.bert import MeanOfTokens
from m3backends.embedders.loading import (
    PROBE,
    LocalEmbedder,
    batch_of,
    check_counts,
    find_model,
    import_extra,
    model_fingerprint,
    quietly,
    share_of,
    unit_rows,
)
from m3backends.embedders.windows import embed_in_windows, token_spans
from m3runtime.device.resolve import resolve
from m3runtime.retrieval.embedder import Embeddings


class SentenceTransformersEmbedder(LocalEmbedder):
    """Embeds with a sentence-transformers model, given as a folder or a hub name.

    Models such as MiniLM, BERT with the mean over tokens, run by torch alone and do not import the library
    (`m3backends.embedders.bert`). Their vectors and their fingerprint are the same either way.

    ``device`` is a torch device or ``auto``. ``query_prompt`` and ``reference_prompt`` are put before every text; None
    takes the model's own prompts, if it has any. A text that is longer than the model reads has the mean of its
    windows' vectors.

    Thread-safe: one call at a time. Raises `PluginError` without the package, `ConfigError` for a model that is
    missing or cannot be loaded, and for a device that this machine does not have.
    """

    kind = "sentence-transformers"

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        query_prompt: str | None = None,
        reference_prompt: str | None = None,
    ) -> None:
        check_counts(self.kind, batch_size=1 if batch_size is None else batch_size)
        self._device = resolve(device, "embedder.device")
        folder, device = find_model(path, self.kind), str(self._device)
        self._batch_size = batch_of(batch_size, device)
        self._prompts = {"query": query_prompt, "reference": reference_prompt}
        self._light = MeanOfTokens.of(folder, device)
        if self._light is not None:
            super().__init__(self._light.dim, self._light.fingerprint(self._prompts))
            return
        library = import_extra("sentence_transformers", self.kind)
        with quietly(path, self.kind):
            self._model = library.SentenceTransformer(str(folder), device=device, local_files_only=True)
            dim = len(self._model.encode("dim", show_progress_bar=False))
        tokenizer = self._model.tokenizer
        super().__init__(
            dim,
            model_fingerprint(
                self._model.named_parameters(), tokenizer.get_vocab(), tokenizer(PROBE)["input_ids"], self._settings()
            ),
        )

    def _settings(self) -> dict[str, Any]:
        # The first module is the transformer, whose own settings change names with releases; the weights, the
        # tokenizer and the longest text show those that matter.
        steps = [[type(step).__name__, step.get_config_dict()] for step in list(self._model)[1:]]
        return {
            "steps": steps,
            "longest": self._model.max_seq_length,
            "model_prompts": {name: text for name, text in self._model.prompts.items() if text},
            "default_prompt": self._model.default_prompt_name,
            "prompts": self._prompts,
        }

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1, with the prompt for references."""
        return self._embed("encode_document", texts, self._prompts["reference"])

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1, with the prompt for queries."""
        return self._embed("encode_query", texts, self._prompts["query"])

    def unknown_share(self, texts: Sequence[str]) -> float:
        """The share of tokens that the tokenizer does not know; see `Embedder.unknown_share`."""
        if not texts:
            return 0.0
        with self.lock:
            if self._light is not None:
                return self._light.unknown_share(texts)
            tokenizer = self._model.tokenizer
            return share_of(tokenizer.unk_token_id, tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def _embed(self, encode: str, texts: Sequence[str], prompt: str | None) -> Embeddings:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        with self.turn(self._device, is_query=encode == "encode_query"):
            if (light := self._light) is not None:
                room = light.longest - 2 - len(light.spans(prompt or ""))  # 2 special tokens

                def embed(parts: list[str]) -> Embeddings:
                    return light.embed([f"{prompt or ''}{part}" for part in parts], self._batch_size)

                rows = embed_in_windows(texts, embed, light.spans, room)
            else:
                # The library batches texts of similar length and puts the rows back in order.
                run = partial(
                    getattr(self._model, encode), prompt=prompt, batch_size=self._batch_size, show_progress_bar=False
                )
                rows = embed_in_windows(texts, run, token_spans(self._model.tokenizer), self._room(prompt))
        return unit_rows(rows, self.dim, self.kind)

    def _room(self, prompt: str | None) -> int:
        """The tokens of the longest text that the library's model reads whole, after a prompt."""
        tokenizer, longest = self._model.tokenizer, self._model.max_seq_length
        if longest is None:
            return sys.maxsize
        prompts = [prompt] if prompt is not None else self._model.prompts.values()
        before = max((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts), default=0)
        return int(longest - tokenizer.num_special_tokens_to_add() - before)
