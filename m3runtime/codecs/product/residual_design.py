"""`ResidualDesign`: each vector is cut into parts, and each part is replaced by its nearest centroid, in levels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Progress
from m3runtime.codecs.files import check_tensors
from m3runtime.codecs.product.kmeans import new_noise
from m3runtime.codecs.product.quantiser import Design
from m3runtime.codecs.product.residual import BITS, Level, parse, text_of
from m3runtime.codecs.product.residual_quantiser import ResidualQuantiser, Tables, offset_codes, offset_of
from m3runtime.codecs.product.residual_training import train_levels
from m3runtime.codecs.steps import Steps
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

SCOPES = ("head", "layer", "model")
ROTATIONS = ("none", "pca", "opq")
PRESETS = ("memory3",)
_MOST_BITS = 14
"""Bits of a level of the preset: a codebook of 16,384 centroids, the paper's largest."""


class ResidualDesign(Design):
    """Each vector is quantised by itself, in levels: see `m3runtime.codecs.product.residual.Level`.

    ``keys`` and ``values`` are levels such as ``2x14+8x10``, each of the residual of those before it; ``key_bytes: 32``
    stands for ``keys: 32x8``. Centroids are learned for each layer and KV head (``scope="head"``), each layer (a
    smaller codec, for samples of few references) or the whole ``model``, for keys and values apart. Vectors are
    rotated before they are cut: to their principal axes, dealt to the parts evenly (``pca``), or as OPQ finds best
    (``opq``). With ``offset``, the mean of the keys of each memory is subtracted first and lies in the payload's fixed
    part, one byte for each channel. Any bytes decode to finite numbers.

    ``preset="memory3"`` is the quantiser of the Memory³ paper: see `_memory3` for head dims unlike its own. Raises
    `CodecError` for options that contradict each other or do not fit the spec.
    """

    def __init__(self, spec: MemorySpec, options: Mapping[str, Any]) -> None:
        super().__init__(spec)
        chosen = dict(options)
        if "preset" in chosen:
            preset = _one_of("preset", chosen.pop("preset"), PRESETS)
            for other in chosen:
                raise CodecError(f"{other} of the product codec cannot be set together with preset {preset}")
            chosen = _memory3(spec.head_dim)
        self.keys = _levels(chosen, "keys", "key_bytes", 32, spec.head_dim)
        self.values = _levels(chosen, "values", "value_bytes", 16, spec.head_dim)
        scope = _one_of("scope", chosen.get("scope", "head"), SCOPES)
        self.rotation: str = _one_of("rotation", chosen.get("rotation", "pca"), ROTATIONS)
        self.offset: bool = chosen.get("offset", True)
        if not isinstance(self.offset, bool):
            raise CodecError(f"offset of the product codec must be true or false, not {self.offset!r}")
        self.heads = spec.vectors_per_token
        # Neighbouring heads that share what was learned.
        self.sharing = {"head": 1, "layer": spec.kv_heads, "model": self.heads}[scope]
        self.options = {
            "keys": text_of(self.keys),
            "values": text_of(self.values),
            "rotation": self.rotation,
            "scope": scope,
            "offset": self.offset,
        }
        self.fixed_bytes = self.heads * spec.head_dim if self.offset else 0
        self.token_bytes = self.heads * sum(level.bytes for level in (*self.keys, *self.values))
        dim, groups = spec.head_dim, self.heads // self.sharing
        centroids = sum(level.centroids for level in (*self.keys, *self.values))
        rotations = 0 if self.rotation == "none" else 2 * (dim + 1)
        self.learned_bytes = 4 * dim * (groups * (centroids + rotations) + 2 * self.heads * self.offset)

    def fit(
        self,
        sample: MemoryTensors,
        importance: Tensor | None,  # noqa: ARG002 - centroids minimise plain squared error
        progress: Progress | None,
        steps: Steps,
    ) -> ResidualQuantiser:
        """Train a quantiser: see `Design.fit`. Too few vectors for a set of centroids are repeated with noise."""
        noise, found = new_noise(), []
        offset = self._offset(sample) if self.offset else None
        for number, (x, levels) in enumerate(((sample.keys, self.keys), (sample.values, self.values))):
            vectors = self._vectors(x, sample, offset if number == 0 else None)

            def done(share: float, number: int = number) -> None:
                if progress:
                    progress((number + share) / 2)

            found.append(train_levels(vectors, levels, self.rotation, noise, done, steps, "kv"[number]))
        return ResidualQuantiser(self.heads, found[0], found[1], offset)

    def _vectors(self, x: Tensor, sample: MemoryTensors, offset: Tensor | None) -> Tensor:
        """The vectors that share what is learned, ``float32[groups, vectors, head_dim]``, without their offset."""
        exists = sample.exists()
        heads = torch.empty(self.heads, int(exists.sum()), self.spec.head_dim)
        for head, into in enumerate(heads):
            into.copy_(self._of_head(x, head)[exists])
        if offset is not None:
            at = 0
            for own in sample.tokens.tolist():
                of_one = heads[:, at : at + own]
                of_one -= offset_of(offset_codes(of_one, offset), offset)[:, None]
                at += own
        return heads.view(self.heads // self.sharing, -1, self.spec.head_dim)

    def _of_head(self, x: Tensor, head: int) -> Tensor:
        """The vectors of one head, ``[n, tokens, head_dim]``; what it does not keep is filled: see `layout.cycled`."""
        own = x[:, head // self.spec.kv_heads, head % self.spec.kv_heads].cpu()
        return own[:, layout.cycled(self.spec, own.shape[1]).flatten(0, 1)[head]] if self.spec.budgets else own

    def _offset(self, sample: MemoryTensors) -> Tensor:
        """Low and step of the mean of a memory's keys, ``float32[2, heads, head_dim]``."""
        exists = sample.exists()
        found = []
        for head in range(self.heads):
            keys = self._of_head(sample.keys, head).float()
            means = torch.stack([row[:own].mean(0) for row, own in zip(keys, sample.tokens.tolist(), strict=True)])
            # Room on both sides for memories unlike those of the sample.
            room = keys[exists].std(0, correction=0)
            low = means.amin(0) - room
            found.append(torch.stack([low, (means.amax(0) + room - low) / 255]))
        return torch.stack(found, 1)

    def restore(self, tensors: Mapping[str, Tensor]) -> ResidualQuantiser:
        """The quantiser of learned tensors: see `Design.restore`."""
        groups, dim = self.heads // self.sharing, self.spec.head_dim
        wanted: dict[str, tuple[int, ...]] = {"offset": (2, self.heads, dim)} if self.offset else {}
        for name, levels in (("keys", self.keys), ("values", self.values)):
            for i, level in enumerate(levels):
                wanted[f"{name}.{i}"] = (groups, level.parts, level.centroids, dim // level.parts)
            if self.rotation != "none":
                wanted[f"{name}.rotation"] = (groups, dim, dim)
            if self.rotation == "pca":
                wanted[f"{name}.mean"] = (groups, dim)
        check_tensors(tensors, wanted)
        keys, values = Tables.of("keys", self.keys, tensors), Tables.of("values", self.values, tensors)
        return ResidualQuantiser(self.heads, keys, values, tensors.get("offset"))


def _levels(options: Mapping[str, Any], name: str, short: str, default: int, head_dim: int) -> tuple[Level, ...]:
    """The levels that ``keys: 16x8`` or ``key_bytes: 16`` mean."""
    if name in options:
        if short in options:
            raise CodecError(f"{short} of the product codec cannot be set together with {name}")
        return parse(options[name], f"{name} of the product codec", head_dim)
    size = options.get(short, default)
    allowed = [size for size in range(1, head_dim + 1) if head_dim % size == 0]
    if size not in allowed:
        sizes = ", ".join(map(str, allowed))
        raise CodecError(f"{short} must divide head_dim {head_dim}: one of {sizes}, not {size!r}")
    return (Level(int(size), 8),)


def _memory3(head_dim: int) -> dict[str, Any]:
    """The paper's OPQ20_80,Residual2x14,PQ8x10, of 14 bytes: as it is for any number of channels that 8 divides.

    For others, each level has the number of parts, among those that divide the channels, that makes the most of the
    paper's bits (28 and 80) in codebooks no larger than its largest; of equals, the one nearest to the paper's.
    """
    levels = text_of([_fitting(2, 14, head_dim), _fitting(8, 10, head_dim)])
    return {"keys": levels, "values": levels, "rotation": "opq", "scope": "model", "offset": False}


def _fitting(parts: int, bits: int, head_dim: int) -> Level:
    """The level whose bits come nearest to so many parts and bits, for this head dim: see `_memory3`."""
    most = parts * bits
    can_be = [Level(n, min(_MOST_BITS, most // n)) for n in range(1, most // BITS[0] + 1) if head_dim % n == 0]
    return max(can_be, key=lambda level: (level.parts * level.bits, -abs(level.parts - parts)))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise CodecError(f"{name} of the product codec must be one of {', '.join(allowed)}, not {value!r}")
    return str(value)
