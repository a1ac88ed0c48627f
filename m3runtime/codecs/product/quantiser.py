"""`Design` and `Quantiser`: the two states of the `product` codec, before and after training."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.steps import Steps
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

Vectors = tuple[Tensor, Tensor]
"""Keys and values of one memory: ``float32[layers * kv_heads, tokens, head_dim]`` each, contiguous and finite."""


class Quantiser(ABC):
    """Trained: turns the vectors of a memory into codes and back. Immutable, so any thread may use it.

    A payload is ``fixed_bytes``, then ``token_bytes`` for each token. Every byte decodes to finite numbers.
    """

    fixed_bytes: int
    token_bytes: int
    peak: float
    """No decoded value exceeds it."""

    @property
    @abstractmethod
    def heads_of_bytes(self) -> Tensor:
        """The head that each byte of a token is of, among layers x KV heads: ``int64[token_bytes]`` on the CPU.

        Asked for only where the spec has budgets.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The learned tensors by name, as the codec's file holds them."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """A copy on another device."""

    @abstractmethod
    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """Write one memory's codes to its payload, ``uint8[fixed_bytes + tokens * token_bytes]``.

        Both lie on this quantiser's device; the vectors may be overwritten. Deterministic. Nothing waits for the
        device, and nothing is copied to the host.
        """

    def encode_all(self, vectors: Vectors, counts: Sequence[int], payloads: Tensor) -> None:
        """Write the codes of several memories to ``uint8[n, at least their bytes]``, as `encode` does those of one.

        Their tokens follow one another in ``vectors``, ``float32[layers * kv_heads, sum(counts), head_dim]``.
        """
        pairs = zip(*(torch.split(x, list(counts), 1) for x in vectors), strict=True)
        for (keys, values), count, payload in zip(pairs, counts, payloads, strict=True):
            own = payload[: self.fixed_bytes + count * self.token_bytes]
            self.encode((keys.contiguous(), values.contiguous()), own)

    @abstractmethod
    def decode(self, payloads: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Vectors:
        """The vectors of ``uint8[n, at least fixed_bytes + width * token_bytes]`` on this quantiser's device.

        Two contiguous ``[n, layers * kv_heads, width, head_dim]`` of the caller's own, of float32 or of ``dtype``, if
        that is faster; all values, and a hundredth more, are in its range. What a memory decodes to
        depends neither on the others of the batch nor on ``width``. Where a memory has fewer tokens, what follows its
        own is of no meaning. Nothing waits for the device.
        """


class Design(ABC):
    """Untrained: the options by which memories of a spec are quantised."""

    options: Mapping[str, Any]
    """The codec's options that make this design, every one stated, as JSON values."""
    fixed_bytes: int
    """Most bytes of a payload before its tokens."""
    token_bytes: int
    """Most bytes of a token, all layers and heads together."""
    learned_bytes: int
    """About the most bytes of what is learned."""

    def __init__(self, spec: MemorySpec) -> None:
        self.spec = spec

    def most_bytes(self, tokens: int) -> int:
        """Most bytes of the payload of so many tokens."""
        return self.fixed_bytes + -(-self.token_bytes * self.spec.numbers(tokens) // self.spec.numbers_per_token)

    @abstractmethod
    def fit(
        self, sample: MemoryTensors, importance: Tensor | None, progress: Progress | None, steps: Steps
    ) -> Quantiser:
        """Train on memories, at least one and finite, on the CPU. Deterministic, also if ``steps`` were kept before.

        ``importance`` is that of `m3runtime.codecs.base.Codec.fit`. Raises `PluginError` if faiss is missing.
        """

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> Quantiser:
        """The quantiser of tensors that `Quantiser.tensors` gave; they are finite and aligned.

        Raises `CodecError` if they are not what this design learns.
        """
