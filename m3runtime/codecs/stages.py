"""Quantisers of single vectors: each is cut into parts, and each part is replaced by the nearest of its centroids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Progress
from m3runtime.codecs.nearest import nearest, scorer
from m3runtime.codecs.quantiser import Design, Quantiser, Vectors, check_tensors
from m3runtime.errors import CodecError
from m3runtime.spec import MemorySpec

CENTROIDS = 256
SCOPES = ("head", "layer")


class StagesDesign(Design):
    """Keys in ``key_bytes`` bytes each, values in ``value_bytes``.

    A vector is cut into as many parts as it has bytes, and each part is replaced by the nearest of 256
    centroids. Centroids are learned for each layer and KV head (``scope="head"``), or shared by the heads of
    a layer (``scope="layer"``: a smaller codec, for samples of few references). What the keys of one memory
    have in common, their mean, is taken off first and lies in the payload's fixed part, one byte for each
    channel: any byte decodes to a finite number. Raises `CodecError` for options that do not fit the spec.
    """

    names: ClassVar[Sequence[str]] = ("keys", "values", "offset")

    def __init__(self, spec: MemorySpec, key_bytes: int = 32, value_bytes: int = 16, scope: str = "head") -> None:
        super().__init__(spec)
        allowed = [size for size in range(1, spec.head_dim + 1) if spec.head_dim % size == 0]
        for name, size in (("key_bytes", key_bytes), ("value_bytes", value_bytes)):
            if size not in allowed:
                sizes = ", ".join(map(str, allowed))
                raise CodecError(f"{name} must divide head_dim {spec.head_dim}: one of {sizes}, not {size!r}")
        if scope not in SCOPES:
            raise CodecError(f"scope of the product codec must be one of {', '.join(SCOPES)}, not {scope!r}")
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.scope = scope
        self.heads = spec.vectors_per_token
        # Neighbouring heads that share their centroids.
        self.sharing = spec.kv_heads if scope == "layer" else 1

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Design.options`."""
        return {"key_bytes": self.key_bytes, "value_bytes": self.value_bytes, "scope": self.scope}

    @property
    def fixed_bytes(self) -> int:
        """See `Design.fixed_bytes`."""
        return self.heads * self.spec.head_dim

    @property
    def token_bytes(self) -> int:
        """See `Design.token_bytes`."""
        return self.heads * (self.key_bytes + self.value_bytes)

    def fit(
        self,
        memories: Sequence[Vectors],
        importance: Tensor | None,  # noqa: ARG002 - centroids minimise plain squared error
        progress: Progress | None,
    ) -> "StagesQuantiser":
        """See `Design.fit`. With fewer than 256 vectors for a set of centroids, they are repeated with noise."""
        from m3runtime.codecs import training  # the only part that needs faiss

        means = torch.stack([keys.mean(1) for keys, _ in memories])
        # Room on both sides for memories unlike those of the sample.
        room = torch.cat([keys for keys, _ in memories], 1).std(1, correction=0)
        low = means.amin(0) - room
        offset = torch.stack([low, (means.amax(0) + room - low) / 255])
        groups = self.heads // self.sharing

        def grouped(vectors: list[Tensor]) -> Tensor:  # of [heads, tokens, dim] -> [groups, all tokens, dim]
            return torch.cat(vectors, 1).reshape(groups, -1, self.spec.head_dim)

        keys = grouped([keys - _offset(_offset_codes(keys, offset), offset) for keys, _ in memories])
        values = grouped([values for _, values in memories])
        trained = training.train([(keys, self.key_bytes), (values, self.value_bytes)], CENTROIDS, progress)
        return StagesQuantiser(self, trained[0], trained[1], offset)

    def restore(self, tensors: Mapping[str, Tensor]) -> "StagesQuantiser":
        """See `Design.restore`."""
        groups, dim = self.heads // self.sharing, self.spec.head_dim
        check_tensors(
            tensors,
            {
                "keys": (groups, self.key_bytes, CENTROIDS, dim // self.key_bytes),
                "values": (groups, self.value_bytes, CENTROIDS, dim // self.value_bytes),
                "offset": (2, self.heads, dim),
            },
        )
        return StagesQuantiser(self, tensors["keys"], tensors["values"], tensors["offset"])


@dataclass(frozen=True, eq=False)
class StagesQuantiser(Quantiser):
    """See `StagesDesign`. ``G`` is layers x KV heads for scope ``head``, layers for scope ``layer``."""

    design: StagesDesign
    keys: Tensor  # float32[G, key_bytes, 256, head_dim / key_bytes]
    values: Tensor  # float32[G, value_bytes, 256, head_dim / value_bytes]
    offset: Tensor  # float32[2, layers * kv_heads, head_dim]: the least mean of a memory's keys, and the step

    @property
    def fixed_bytes(self) -> int:  # type: ignore[override]
        """See `Quantiser`."""
        return self.design.fixed_bytes

    @property
    def token_bytes(self) -> int:  # type: ignore[override]
        """See `Quantiser`."""
        return self.design.token_bytes

    @cached_property
    def peak(self) -> float:  # type: ignore[override]
        """See `Quantiser`."""
        low, step = self.offset.abs()
        highest = float(self.keys.abs().max()) + float((low + 255 * step).max())
        return max(highest, float(self.values.abs().max()))

    def tensors(self) -> dict[str, Tensor]:
        """See `Quantiser.tensors`."""
        return {"keys": self.keys, "values": self.values, "offset": self.offset}

    def to(self, device: torch.device) -> "StagesQuantiser":
        """See `Quantiser.to`."""
        return StagesQuantiser(self.design, self.keys.to(device), self.values.to(device), self.offset.to(device))

    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """See `Quantiser.encode`. On ``torch.get_num_threads()`` threads on a CPU."""
        keys, values = vectors
        offset = _offset_codes(keys, self.offset)
        keys -= _offset(offset, self.offset)
        payload[: self.fixed_bytes] = offset.flatten()
        key_codes, value_codes = self._codes(payload[None], keys.shape[1])
        nearest(keys, self._score_keys, self.design.sharing, key_codes[0])
        nearest(values, self._score_values, self.design.sharing, value_codes[0])

    def decode(self, payloads: Tensor, width: int) -> Vectors:
        """See `Quantiser.decode`."""
        key_codes, value_codes = self._codes(payloads, width)
        shape = (self.design.heads, self.design.spec.head_dim)
        fixed = torch.unflatten(payloads[:, : self.fixed_bytes], 1, shape)
        keys = self._looked_up(key_codes, self.keys).add_(_offset(fixed, self.offset))
        return keys, self._looked_up(value_codes, self.values)

    @cached_property
    def _score_keys(self) -> Tensor:
        return scorer(self.keys)

    @cached_property
    def _score_values(self) -> Tensor:
        return scorer(self.values)

    def _codes(self, payloads: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Views ``uint8[n, width, heads, parts]`` of the codes of keys and values."""
        key_bytes, value_bytes = self.design.heads * self.design.key_bytes, self.design.heads * self.design.value_bytes
        keys, values = layout.split(payloads, width, self.fixed_bytes, key_bytes, value_bytes)
        return torch.unflatten(keys, 2, (self.design.heads, -1)), torch.unflatten(values, 2, (self.design.heads, -1))

    def _looked_up(self, codes: Tensor, centroids: Tensor) -> Tensor:
        """Contiguous ``float32[n, heads, width, head_dim]`` of codes ``uint8[n, width, heads, parts]``.

        One gather for all. The small codes are brought into the order of the result, not the vectors. A
        centroid of up to 16 bytes is gathered as one number, which is several times as fast as a short row
        on a CPU.
        """
        n, width, _, parts = codes.shape
        dim = centroids.shape[3]
        group = torch.arange(self.design.heads, device=codes.device) // self.design.sharing
        first = (group[:, None] * parts + torch.arange(parts, device=codes.device)) * CENTROIDS
        index = torch.empty(n, self.design.heads, width, parts, dtype=torch.int64, device=codes.device)
        torch.add(codes.transpose(1, 2), first[:, None], out=index)
        one = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}.get(dim)
        if one is None:
            found = torch.nn.functional.embedding(index, centroids.view(-1, dim))
        else:
            found = torch.gather(centroids.view(one).flatten(), 0, index.flatten()).view(torch.float32)
        return found.view(n, self.design.heads, width, self.design.spec.head_dim)


def _offset_codes(keys: Tensor, offset: Tensor) -> Tensor:
    """The mean of keys ``[heads, tokens, dim]`` in one byte each: ``uint8[heads, dim]``."""
    low, step = offset
    # A step of zero is that of a channel whose mean did not vary in the sample.
    codes = torch.round((keys.mean(1) - low) / torch.where(step == 0, 1, step))
    return codes.clamp(0, 255).to(torch.uint8)


def _offset(codes: Tensor, offset: Tensor) -> Tensor:
    """What `_offset_codes` stands for, ``float32[..., heads, 1, dim]``."""
    low, step = offset
    return torch.unsqueeze(codes.to(torch.float32) * step + low, -2)
