"""A substitute for a runtime that recalls what a test gives."""

from collections.abc import Sequence
from typing import Any

import torch

from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.recall.recalled import Recalled
from m3runtime.stream import Stream


class GivenMemories:
    """A recaller whose streams get the memories of these texts at every chunk, and nothing else."""

    def __init__(self, adapter: TransformersAdapter, texts: Sequence[str], *, chunk_tokens: int = 8) -> None:
        self.config = Config.model_validate(
            {
                "bank": "nowhere",
                "model": {"path": "given"},
                "embedder": {"path": "given"},
                "recall": {"chunk_tokens": chunk_tokens, "lookahead_tokens": 0},
            }
        )
        self.spec, self.dtype = adapter.spec, adapter.dtype
        self.texts = texts
        encoded = adapter.encode(texts)
        self.parts = [
            (keys[:, :, :count], values[:, :, :count])
            for keys, values, count in zip(encoded.keys, encoded.values, encoded.tokens.tolist(), strict=True)
        ]

    def stream(self) -> Stream:
        """A new stream."""
        return Stream(self, self.dtype)

    def recall(self, streams: Sequence[Stream], *_: Any, **__: Any) -> list[Recalled]:
        """The same for all."""
        count = len(self.parts)
        one = Recalled(
            ids=tuple(range(1, count + 1)),
            scores=(0.5,) * count,
            references=tuple(Reference(text, 1) for text in self.texts),
            late=(),
            spec=self.spec,
            device=torch.device("cpu"),
            dtype=self.dtype,
            parts=tuple(self.parts),
            tokens=sum(keys.shape[2] for keys, _ in self.parts),
            log_weights=(0.0,) * count,
        )
        return [one] * len(streams)

    def hint(self, *_: Any) -> None:
        """Nothing to look up."""

    def release(self, _: Stream) -> None:
        """Nothing is held."""
