"""A tiny random model that needs no transformers library, so that processes with it start fast."""

from collections.abc import Sequence
from typing import Self
from zlib import crc32

import torch

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import MemoryConfig, ModelConfig
from m3runtime.errors import InputError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

WIDTH, WORDS = 32, 512


class WordModel(Adapter):
    """Each token is a word. Keys and values depend on all words before it, by random weights of a fixed seed."""

    spec = MemorySpec(layers=(0, 1), kv_heads=2, tokens=32, head_dim=8, reference_tokens=32, dtype="float32")
    name = "words"
    model_fingerprint = "a" * 32
    tokenizer_fingerprint = "b" * 32
    sink = ""
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(7)
        self._words = torch.randn(WORDS, WIDTH, generator=made)
        self._weights = torch.randn(WIDTH, 2 * 2 * 2 * 8, generator=made) / WIDTH**0.5

    @classmethod
    def open(cls, model: ModelConfig, memory: MemoryConfig, device: torch.device) -> Self:
        return cls()

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def encode(self, references: Sequence[str]) -> MemoryTensors:
        texts = [[crc32(word.encode()) % WORDS for word in text.split()] for text in references]
        counts = torch.tensor([len(text) for text in texts])
        if not len(texts) or counts.min() == 0 or counts.max() > self.spec.tokens:
            raise InputError("a reference is blank or too long")
        padded = torch.tensor([text + [0] * (int(counts.max()) - len(text)) for text in texts])
        hidden = torch.tanh(self._words[padded].cumsum(1) / (torch.arange(padded.shape[1]) + 1)[:, None])
        both = (hidden @ self._weights).view(*padded.shape, 2, 2, 2, 8)  # [B, T, K or V, layer, head, dim]
        keys, values = both.permute(2, 0, 3, 4, 1, 5).contiguous()
        return MemoryTensors(keys, values, counts)
