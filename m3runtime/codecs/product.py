"""The `product` codec: a vector quantiser, trained on the bank's own memories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from m3runtime.codecs import files, layout
from m3runtime.codecs.base import Codec, Distortion, Progress
from m3runtime.codecs.nearest import nearest, scorer
from m3runtime.errors import CodecError
from m3runtime.memory import Memories
from m3runtime.spec import MemorySpec

CENTROIDS = 256
SCOPES = ("head", "layer")
_HELD_OUT = 8
"""One of so many memories of the sample is kept from training, to measure the distortion on."""


@dataclass(frozen=True)
class _Trained:
    """What was learned. ``G`` is layers x KV heads for scope ``head``, layers for scope ``layer``."""

    keys: Tensor  # float32[G, key_bytes, 256, head_dim / key_bytes]
    values: Tensor  # float32[G, value_bytes, 256, head_dim / value_bytes]
    offset: Tensor  # float32[2, layers * kv_heads, head_dim]: the least mean of a memory's keys, and the step

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values, "offset": self.offset}

    def to(self, device: torch.device) -> "_Trained":
        return _Trained(self.keys.to(device), self.values.to(device), self.offset.to(device))

    @cached_property
    def score_keys(self) -> Tensor:
        return scorer(self.keys)

    @cached_property
    def score_values(self) -> Tensor:
        return scorer(self.values)


@dataclass(frozen=True)
class _State:
    """Replaced as a whole when the codec is trained, so that a thread sees all of it or nothing."""

    trained: _Trained
    fingerprint: str
    measured: Distortion | None
    peak: float  # no decoded value exceeds it
    on: dict[torch.device, _Trained] = field(default_factory=dict)  # copies, made when first asked for


class ProductCodec(Codec):
    """Stores each key in ``key_bytes`` bytes and each value in ``value_bytes``.

    A vector is cut into as many parts as it has bytes, and each part is replaced by the nearest of 256
    centroids. Centroids are learned for each layer and KV head (``scope="head"``), or shared by the heads of
    a layer (``scope="layer"``: a smaller codec, for samples of few references). What the keys of one memory
    have in common, their mean, is taken off first and lies in the payload's fixed part, one byte for each
    channel: any byte decodes to a finite number.

    `fit` needs faiss (``m3runtime[train]``); nothing else does. `encode` runs where the memories lie, on
    ``torch.get_num_threads()`` threads on a CPU. Raises `CodecError` for options that do not fit the spec.
    """

    kind: ClassVar[str] = "product"

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
        self._heads = spec.vectors_per_token
        self._fixed = self._heads * spec.head_dim
        # Neighbouring heads that share their centroids.
        self._sharing = spec.kv_heads if scope == "layer" else 1
        self._state: _State | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """``key_bytes``, ``value_bytes`` and ``scope``."""
        return {"key_bytes": self.key_bytes, "value_bytes": self.value_bytes, "scope": self.scope}

    @property
    def trained(self) -> bool:
        """See `Codec.trained`."""
        return self._state is not None

    @property
    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return self._ready().fingerprint

    @property
    def measured(self) -> Distortion | None:
        """Distortion on the held-out part of the sample; None before `fit`, and for a sample of one."""
        return None if self._state is None else self._state.measured

    def payload_bytes(self, tokens: int) -> int:
        """See `Codec.payload_bytes`."""
        return self._fixed + tokens * self._heads * (self.key_bytes + self.value_bytes)

    def fit(self, sample: Memories, progress: Progress | None = None) -> None:
        """Train on all but the last eighth of a sample (at least one memory), and measure on the rest.

        Deterministic. About 50 references of 100 tokens are enough; with fewer than 256 vectors for a
        set of centroids, they are repeated with noise. Runs on the CPU on ``torch.get_num_threads()`` threads;
        ``progress`` is called from the caller's. Raises `CodecError` if the sample is empty or does not fit,
        `PluginError` if faiss is missing.
        """
        from m3runtime.codecs import training  # the only part that needs faiss

        sample.check(self.spec)
        if not len(sample):
            raise CodecError("the product codec cannot be trained on no memories")
        held_out = 0 if len(sample) == 1 else max(1, len(sample) // _HELD_OUT)
        train_on = range(len(sample) - held_out)
        memories = [[x.cpu() for x in layout.vectors(sample, i, self.spec)] for i in train_on]
        means = torch.stack([keys.mean(1) for keys, _ in memories])
        # Room on both sides for memories unlike those of the sample.
        room = torch.cat([keys for keys, _ in memories], 1).std(1, correction=0)
        low = means.amin(0) - room
        offset = torch.stack([low, (means.amax(0) + room - low) / 255])
        groups = self._heads // self._sharing

        def grouped(vectors: list[Tensor]) -> Tensor:  # of [heads, tokens, dim] -> [groups, all tokens, dim]
            return torch.cat(vectors, 1).reshape(groups, -1, self.spec.head_dim)

        keys = grouped([keys - _offset(_offset_codes(keys, offset), offset) for keys, _ in memories])
        values = grouped([values for _, values in memories])
        trained = training.train([(keys, self.key_bytes), (values, self.value_bytes)], CENTROIDS, progress)
        state = self._made(_Trained(trained[0], trained[1], offset), None)
        measured = None
        if held_out:
            rest = slice(len(sample) - held_out, None)
            judge = type(self)(self.spec, self.key_bytes, self.value_bytes, self.scope)
            judge._state = state
            measured = judge.distortion(Memories(sample.keys[rest], sample.values[rest], sample.tokens[rest]))
        self._state = _State(state.trained, state.fingerprint, measured, state.peak)

    def encode(self, memories: Memories) -> Tensor:
        """See `Codec.encode`."""
        trained = self._on(memories.keys.device)
        memories.check(self.spec)
        rows = torch.zeros(len(memories), self.payload_bytes(self.spec.tokens), dtype=torch.uint8)
        for i, row in enumerate(rows):
            # One memory at a time: a matrix product may round otherwise in a larger batch.
            keys, values = layout.vectors(memories, i, self.spec)
            offset = _offset_codes(keys, trained.offset)
            keys -= _offset(offset, trained.offset)
            row[: self._fixed] = offset.flatten()
            own = row[None, : self.payload_bytes(keys.shape[1])]
            key_codes, value_codes = self._codes(own, keys.shape[1])
            nearest(keys, trained.score_keys, self._sharing, key_codes[0])
            nearest(values, trained.score_values, self._sharing, value_codes[0])
        return rows

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> Memories:
        """See `Codec.decode`. No bytes are refused, and nothing waits for the device."""
        trained = self._on(payloads.device)
        width = layout.width_of(payloads, tokens, self.spec)
        layout.check_length(payloads, self.payload_bytes(width))
        key_codes, value_codes = self._codes(payloads, width)
        fixed = torch.unflatten(payloads[:, : self._fixed], 1, (self._heads, self.spec.head_dim))
        keys = self._looked_up(key_codes, trained.keys).add_(_offset(fixed, trained.offset))
        values = self._looked_up(value_codes, trained.values)
        return layout.finish(keys, values, tokens, self.spec, dtype, self._ready().peak)

    def save(self, path: Path) -> None:
        """See `Codec.save`."""
        state = self._ready()
        files.write(path, self, state.trained.tensors(), state.measured)

    @classmethod
    def load(cls, path: Path, spec: MemorySpec) -> "ProductCodec":
        """See `Codec.load`."""
        file = files.read(path, cls.kind, spec)
        codec = file.make(cls, spec)
        groups = codec._heads // codec._sharing
        file.expect(
            {
                "keys": (groups, codec.key_bytes, CENTROIDS, spec.head_dim // codec.key_bytes),
                "values": (groups, codec.value_bytes, CENTROIDS, spec.head_dim // codec.value_bytes),
                "offset": (2, codec._heads, spec.head_dim),
            }
        )
        # The clones are aligned, whatever the file was: `_looked_up` reads several floats as one number.
        trained = _Trained(**{name: tensor.clone() for name, tensor in file.tensors.items()})
        codec._state = codec._made(trained, file.measured)
        if not codec._state.peak < torch.finfo(torch.bfloat16).max:
            raise CodecError(f"{path}: its values are too large")
        return codec

    def _ready(self) -> _State:
        if self._state is None:
            raise CodecError("the product codec is not trained: call fit, or load a trained one")
        return self._state

    def _on(self, device: torch.device) -> _Trained:
        state = self._ready()
        if device not in state.on:
            state.on[device] = state.trained.to(device)
        return state.on[device]

    def _made(self, trained: _Trained, measured: Distortion | None) -> _State:
        low, step = trained.offset.abs()
        highest = float(trained.keys.abs().max()) + float((low + 255 * step).max())
        peak = max(highest, float(trained.values.abs().max()))
        return _State(trained, files.codec_fingerprint(self, trained.tensors()), measured, peak)

    def _codes(self, payloads: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Views ``uint8[n, width, heads, parts]`` of the codes of keys and values."""
        key_bytes, value_bytes = self._heads * self.key_bytes, self._heads * self.value_bytes
        keys, values = layout.split(payloads, width, self._fixed, key_bytes, value_bytes)
        return torch.unflatten(keys, 2, (self._heads, -1)), torch.unflatten(values, 2, (self._heads, -1))

    def _looked_up(self, codes: Tensor, centroids: Tensor) -> Tensor:
        """Contiguous ``float32[n, heads, width, head_dim]`` of codes ``uint8[n, width, heads, parts]``.

        One gather for all. The small codes are brought into the order of the result, not the vectors. A
        centroid of up to 16 bytes is gathered as one number, which is several times as fast as a short row
        on a CPU.
        """
        n, width, _, parts = codes.shape
        dim = centroids.shape[3]
        group = torch.arange(self._heads, device=codes.device) // self._sharing
        first = (group[:, None] * parts + torch.arange(parts, device=codes.device)) * CENTROIDS
        index = torch.empty(n, self._heads, width, parts, dtype=torch.int64, device=codes.device)
        torch.add(codes.transpose(1, 2), first[:, None], out=index)
        one = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}.get(dim)
        if one is None:
            found = torch.nn.functional.embedding(index, centroids.view(-1, dim))
        else:
            found = torch.gather(centroids.view(one).flatten(), 0, index.flatten()).view(torch.float32)
        return found.view(n, self._heads, width, self.spec.head_dim)


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
