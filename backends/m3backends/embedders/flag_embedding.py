"""`FlagEmbedder`: BGE-M3 and the other encoder models of the FlagEmbedding library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m3backends.embedders.loading import (
    PROBE,
    LocalEmbedder,
    batch_of,
    check_counts,
    find_model,
    import_extra,
    model_fingerprint,
    quietly,
    unit_rows,
)
from m3backends.embedders.windows import embed_in_windows, token_spans
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.retrieval.embedder import Embeddings

_KIND = "flag-embedding"
# FlagEmbedding's own names for the two classes that embed with an encoder.
M3, BASE = "encoder-only-m3", "encoder-only-base"

# The text before a query in the first two generations of BGE, by their authors; BGE-M3 wants none.
_INSTRUCTIONS = {
    "en": "Represent this sentence for searching relevant passages: ",
    "zh": "为这个句子生成表示以用于检索相关文章：",  # noqa: RUF001
}


class FlagEmbedder(LocalEmbedder):
    """Embeds with a BGE model by FlagEmbedding, given as a folder or a hub name; with BGE-M3 to its dense vector.

    ``model_class`` is ``encoder-only-m3`` or ``encoder-only-base`` (BERT-shaped, such as bge-small-en-v1.5). Without
    it, a folder with ``colbert_linear.pt`` is BGE-M3, a name that FlagEmbedding knows decides, and everything else is
    base with CLS pooling. ``query_instruction`` is put before queries; None takes the one that the model was trained
    with, as far as its name tells. ``device`` is a torch device or ``auto``; weights are float32 on the CPU and float16
    elsewhere. A text of more than ``max_length`` tokens has the mean of its windows' vectors.

    The first one takes half a minute, for FlagEmbedding's import. Thread-safe: one call at a time. Raises
    `PluginError` without the package, `ConfigError` for a model that is missing, cannot be loaded or is a decoder, and
    for a device that this machine does not have.
    """

    kind = _KIND

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        max_length: int = 512,
        query_instruction: str | None = None,
        model_class: str | None = None,
    ) -> None:
        check_counts(_KIND, batch_size=1 if batch_size is None else batch_size, max_length=max_length)
        if model_class not in (None, M3, BASE):
            raise ConfigError(f"embedder {_KIND}: model_class must be {M3} or {BASE}, not {model_class!r}")
        folder = find_model(path, _KIND)
        self._where = resolve(device, "embedder.device")
        self._device = str(self._where)
        library = import_extra("FlagEmbedding", _KIND)
        name = Path(path).expanduser().resolve().name
        self._class, pooling = _recognised(folder, name) if model_class is None else (model_class, "cls")
        load = library.BGEM3FlagModel if self._class == M3 else library.FlagModel
        with quietly(path, _KIND):
            # One device: for several of them FlagEmbedding would start processes.
            self._flag = load(str(folder), pooling_method=pooling, use_fp16=self._device != "cpu", devices=self._device)
            self._flag.model.to(self._device).eval()
        self._encoder: torch.nn.Module = self._flag.model.model if self._class == M3 else self._flag.model
        self._batch_size = batch_of(batch_size, self._device)
        self._max_length = min(max_length, _positions(self._encoder))
        self._instruction = _instruction(name) if query_instruction is None else query_instruction
        settings = {
            "class": self._class,
            "pooling": pooling,
            "longest": self._max_length,
            "instruction": self._instruction,
        }
        super().__init__(
            int(self._encoder.config.hidden_size),
            model_fingerprint(
                self._encoder.named_parameters(),
                self._flag.tokenizer.get_vocab(),
                self._flag.tokenizer(PROBE)["input_ids"],
                settings,
            ),
        )

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1."""
        return self._embed(texts, "", is_query=False)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """``float32[n, dim]`` of length 1, each text after the instruction for queries."""
        return self._embed(texts, self._instruction, is_query=True)

    def _embed(self, texts: Sequence[str], before: str, *, is_query: bool) -> Embeddings:
        def embed(parts: list[str]) -> Embeddings:
            return self._rows([before + part for part in parts])

        with self.turn(self._where, is_query=is_query), torch.inference_mode():
            tokenizer = self._flag.tokenizer
            room = self._max_length - len(tokenizer(before)["input_ids"])
            rows = embed_in_windows(texts, embed, token_spans(tokenizer), room)
        return unit_rows(rows, self.dim, _KIND)

    def _rows(self, texts: Sequence[str]) -> Embeddings:
        # FlagEmbedding's own encode functions run the first batch twice, to find out whether it fits the
        # memory. A query is one batch, so that would double the time of every recall; its model and pooling
        # are called here.
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), self._batch_size):
            rows = longest_first[start : start + self._batch_size]
            vectors[rows] = self._dense([texts[i] for i in rows]).float().cpu().numpy()
        return vectors

    def _dense(self, texts: list[str]) -> torch.Tensor:
        inputs = self._flag.tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        dense: torch.Tensor
        if self._class == M3:
            dense = self._flag.model(inputs, return_dense=True)["dense_vecs"]
        else:
            hidden = self._flag.model(**inputs, return_dict=True).last_hidden_state
            dense = self._flag.pooling(hidden, inputs["attention_mask"])
        return dense


def _recognised(folder: Path, name: str) -> tuple[str, str]:
    """The class and pooling method of a model."""
    if (folder / "colbert_linear.pt").is_file():
        return M3, "cls"
    mapping = import_extra("FlagEmbedding.inference.embedder.model_mapping", _KIND)
    known = mapping.AUTO_EMBEDDER_MAPPING.get(name)
    if known is None:
        return BASE, "cls"
    classes: dict[Any, Any] = {model: choice for choice, model in mapping.EMBEDDER_CLASS_MAPPING.items()}
    choice = str(classes[known.model_class].value)
    if choice not in (M3, BASE):
        raise ConfigError(
            f"embedder {_KIND}: {name} is a decoder ({choice}); use an encoder such as BAAI/bge-m3, or "
            "embedder sentence-transformers"
        )
    return choice, str(known.pooling_method.value)


def _instruction(name: str) -> str:
    parts = name.split("-")
    # bge-small-en, bge-large-zh-v1.5
    return _INSTRUCTIONS.get(parts[2], "") if parts[0] == "bge" and len(parts) > 2 else ""


def _positions(encoder: Any) -> int:
    """The number of tokens that the model has positions for. More crash it, on a GPU for good."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, torch.nn.Embedding):
        return 2**31
    # RoBERTa's kind counts positions from behind the padding's.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
