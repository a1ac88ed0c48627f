"""Quantisers of single vectors: each is cut into parts, and each part is replaced by the nearest of its centroids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Progress
from m3runtime.codecs.product.packing import BITS, Stage, parse, text_of
from m3runtime.codecs.product.quantiser import Design, Quantiser, Vectors, check_tensors
from m3runtime.codecs.product.tables import Tables
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec

SCOPES = ("head", "layer", "model")
ROTATIONS = ("none", "pca", "opq")
PRESETS = ("memory3",)
_MOST_BITS = 14
"""Of a stage of the preset: a codebook of 16,384 centroids, the paper's largest."""


class StagesDesign(Design):
    """Each vector by itself, in stages: see `m3runtime.codecs.product.packing.Stage`.

    ``keys`` and ``values`` are stages such as ``2x14+8x10``, each of what those before it left over; ``key_bytes: 32``
    stands for ``keys: 32x8``. What is learned is learned for each layer and KV head (``scope="head"``), each layer (a
    smaller codec, for samples of few references) or the whole ``model``, for keys and values apart. Vectors are
    rotated before they are cut: to their principal axes, dealt to the parts evenly (``pca``), or as OPQ finds best
    (``opq``). With ``offset``, what the keys of one memory have in common, their mean, is taken off first and lies in
    the payload's fixed part, one byte for each channel. Any bytes decode to finite numbers.

    ``preset="memory3"`` is the quantiser of the Memory³ paper: see `_memory3` for head dims unlike its own. Raises
    `CodecError` for options that contradict each other or do not fit the spec.
    """

    def __init__(
        self,
        spec: MemorySpec,
        key_bytes: int | None = None,
        value_bytes: int | None = None,
        scope: str | None = None,
        *,
        keys: str | None = None,
        values: str | None = None,
        rotation: str | None = None,
        offset: bool | None = None,
        preset: str | None = None,
    ) -> None:
        super().__init__(spec)
        given: dict[str, Any] = {
            "key_bytes": key_bytes,
            "value_bytes": value_bytes,
            "scope": scope,
            "keys": keys,
            "values": values,
            "rotation": rotation,
            "offset": offset,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if preset is not None:
            _one_of("preset", preset, PRESETS)
            if chosen:
                raise CodecError(f"{next(iter(chosen))} of the product codec cannot be set beside preset {preset}")
            chosen = _memory3(spec.head_dim)
        self.keys = _stages(chosen, "keys", "key_bytes", 32, spec.head_dim)
        self.values = _stages(chosen, "values", "value_bytes", 16, spec.head_dim)
        self.scope: str = _one_of("scope", chosen.get("scope", "head"), SCOPES)
        self.rotation: str = _one_of("rotation", chosen.get("rotation", "pca"), ROTATIONS)
        taken_off = chosen.get("offset", True)
        if not isinstance(taken_off, bool):
            raise CodecError(f"offset of the product codec must be true or false, not {taken_off!r}")
        self.offset = taken_off
        self.heads = spec.vectors_per_token
        # Neighbouring heads that share what was learned.
        self.sharing = {"head": 1, "layer": spec.kv_heads, "model": self.heads}[self.scope]
        self.key_size = sum(stage.bytes for stage in self.keys)
        self.value_size = sum(stage.bytes for stage in self.values)

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Design.options`."""
        return {
            "keys": text_of(self.keys),
            "values": text_of(self.values),
            "rotation": self.rotation,
            "scope": self.scope,
            "offset": self.offset,
        }

    @property
    def exchangeable(self) -> bool:
        """Whether faiss has an index that gives the same codes: see `m3runtime.codecs.product.faiss_exchange`."""
        return self.scope == "model" and not self.offset and max(len(self.keys), len(self.values)) <= 2

    @property
    def fixed_bytes(self) -> int:
        """See `Design.fixed_bytes`."""
        return self.heads * self.spec.head_dim if self.offset else 0

    @property
    def token_bytes(self) -> int:
        """See `Design.token_bytes`."""
        return self.heads * (self.key_size + self.value_size)

    def fit(
        self,
        memories: Sequence[Vectors],
        importance: Tensor | None,  # noqa: ARG002 - centroids minimise plain squared error
        progress: Progress | None,
    ) -> "StagesQuantiser":
        """See `Design.fit`. Too few vectors for a set of centroids are repeated with noise."""
        from m3runtime.codecs.product.training import Job, train_stages  # the only part that needs faiss

        all_keys = [keys for keys, _ in memories]
        offset = None
        if self.offset:
            means = torch.stack([keys.mean(1) for keys in all_keys])
            # Room on both sides for memories unlike those of the sample.
            room = torch.cat(all_keys, 1).std(1, correction=0)
            low = means.amin(0) - room
            offset = torch.stack([low, (means.amax(0) + room - low) / 255])
            all_keys = [keys - _offset(_offset_codes(keys, offset), offset)[:, None] for keys in all_keys]
        groups = self.heads // self.sharing

        def grouped(vectors: list[Tensor]) -> Tensor:  # of [heads, tokens, dim] -> [groups, all tokens, dim]
            return torch.cat(vectors, 1).reshape(groups, -1, self.spec.head_dim)

        jobs = [
            Job(grouped(all_keys), self.keys, self.rotation),
            Job(grouped([values for _, values in memories]), self.values, self.rotation),
        ]
        keys, values = (
            Tables(job.stages, found.tables, found.rotation, found.mean)
            for job, found in zip(jobs, train_stages(jobs, progress), strict=True)
        )
        return StagesQuantiser(self, keys, values, offset)

    def restore(self, tensors: Mapping[str, Tensor]) -> "StagesQuantiser":
        """See `Design.restore`."""
        groups, dim = self.heads // self.sharing, self.spec.head_dim
        wanted: dict[str, tuple[int, ...]] = {"offset": (2, self.heads, dim)} if self.offset else {}
        for name, stages in (("keys", self.keys), ("values", self.values)):
            for i, stage in enumerate(stages):
                wanted[f"{name}.{i}"] = (groups, stage.parts, stage.centroids, dim // stage.parts)
            if self.rotation != "none":
                wanted[f"{name}.rotation"] = (groups, dim, dim)
            if self.rotation == "pca":
                wanted[f"{name}.mean"] = (groups, dim)
        check_tensors(tensors, wanted)
        keys, values = Tables.of("keys", self.keys, tensors), Tables.of("values", self.values, tensors)
        return StagesQuantiser(self, keys, values, tensors.get("offset"))


@dataclass(frozen=True, eq=False)
class StagesQuantiser(Quantiser):
    """See `StagesDesign`."""

    design: StagesDesign
    keys: Tables
    values: Tables
    offset: Tensor | None  # float32[2, layers * kv_heads, head_dim]: the least mean of a memory's keys, and the step

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
        keys = self.keys.peak()
        if self.offset is not None:
            low, step = self.offset.abs()
            keys += float((low + 255 * step).max())
        return max(keys, self.values.peak())

    def tensors(self) -> dict[str, Tensor]:
        """See `Quantiser.tensors`."""
        named = self.keys.tensors("keys") | self.values.tensors("values")
        return named if self.offset is None else named | {"offset": self.offset}

    def to(self, device: torch.device) -> "StagesQuantiser":
        """See `Quantiser.to`."""
        return self.design.restore({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """See `Quantiser.encode`. On ``torch.get_num_threads()`` threads on a CPU.

        Where faiss has an index for the same codes, it is asked for them: it adds up distances in an order of its own,
        so a centroid chosen here could be another one where two are as near as rounding.
        """
        keys, values = vectors
        key_codes, value_codes = self._codes(payload[None], keys.shape[1])
        if self.design.exchangeable:
            from m3runtime.codecs.product.faiss_exchange import encode

            encode(self._indexes, (keys.cpu(), values.cpu()), (key_codes[0], value_codes[0]))
            return
        if self.offset is not None:
            offset = _offset_codes(keys, self.offset)
            keys -= _offset(offset, self.offset)[:, None]
            payload[: self.fixed_bytes] = offset.flatten()
        self.keys.encode(keys, key_codes[0])
        self.values.encode(values, value_codes[0])

    def decode(self, payloads: Tensor, width: int) -> Vectors:
        """See `Quantiser.decode`."""
        key_codes, value_codes = self._codes(payloads, width)
        add = None
        if self.offset is not None:
            fixed = torch.unflatten(payloads[:, : self.fixed_bytes], 1, (self.design.heads, -1))
            add = _offset(fixed, self.offset)
        # In one piece: glibc gives two back to the system each time, and page faults cost more than all the rest.
        shape = (2, len(payloads), self.design.heads, width, self.design.spec.head_dim)
        keys, values = torch.empty(shape, device=payloads.device)
        self.keys.decode(key_codes, keys, add)
        self.values.decode(value_codes, values)
        return keys, values

    def _codes(self, payloads: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Views ``uint8[n, width, heads, bytes of a vector]`` of the codes of keys and values."""
        sizes = (self.design.heads * self.design.key_size, self.design.heads * self.design.value_size)
        keys, values = layout.split(payloads, width, self.fixed_bytes, *sizes)
        return torch.unflatten(keys, 2, (self.design.heads, -1)), torch.unflatten(values, 2, (self.design.heads, -1))

    @cached_property
    def _indexes(self) -> tuple[Any, Any]:
        from m3runtime.codecs.product.faiss_exchange import index_of

        return index_of(self.keys), index_of(self.values)


def _stages(options: Mapping[str, Any], name: str, short: str, default: int, head_dim: int) -> tuple[Stage, ...]:
    """The stages that ``keys: 16x8`` or ``key_bytes: 16`` mean."""
    if name in options:
        if short in options:
            raise CodecError(f"{short} of the product codec cannot be set beside {name}")
        return parse(options[name], f"{name} of the product codec", head_dim)
    size = options.get(short, default)
    allowed = [size for size in range(1, head_dim + 1) if head_dim % size == 0]
    if size not in allowed:
        sizes = ", ".join(map(str, allowed))
        raise CodecError(f"{short} must divide head_dim {head_dim}: one of {sizes}, not {size!r}")
    return (Stage(int(size), 8),)


def _memory3(head_dim: int) -> dict[str, Any]:
    """The paper's OPQ20_80,Residual2x14,PQ8x10, of 14 bytes: as it is for any number of channels that 8 divides.

    For others, each stage has the number of parts, among those that divide the channels, that makes the most of the
    paper's bits (28 and 80) in codebooks no larger than its largest; of equals, the one nearest to the paper's.
    """
    stages = text_of([_fitting(2, 14, head_dim), _fitting(8, 10, head_dim)])
    return {"keys": stages, "values": stages, "rotation": "opq", "scope": "model", "offset": False}


def _fitting(parts: int, bits: int, head_dim: int) -> Stage:
    """See `_memory3`."""
    most = parts * bits
    can_be = [Stage(n, min(_MOST_BITS, most // n)) for n in range(1, most // BITS[0] + 1) if head_dim % n == 0]
    return max(can_be, key=lambda stage: (stage.parts * stage.bits, -abs(stage.parts - parts)))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise CodecError(f"{name} of the product codec must be one of {', '.join(allowed)}, not {value!r}")
    return str(value)


def _offset_codes(keys: Tensor, offset: Tensor) -> Tensor:
    """The mean of keys ``[heads, tokens, dim]`` in one byte each: ``uint8[heads, dim]``."""
    low, step = offset
    # A step of zero is that of a channel whose mean did not vary in the sample.
    codes = torch.round((keys.mean(1) - low) / torch.where(step == 0, 1, step))
    return codes.clamp(0, 255).to(torch.uint8)


def _offset(codes: Tensor, offset: Tensor) -> Tensor:
    """What `_offset_codes` stands for, ``float32[..., heads, dim]``."""
    low, step = offset
    found: Tensor = codes.to(torch.float32) * step + low
    return found
