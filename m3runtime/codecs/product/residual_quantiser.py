"""`ResidualQuantiser`: the trained state of a `ResidualDesign`. It encodes single vectors and decodes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.product.kernels.look_up import look_up
from m3runtime.codecs.product.kernels.nearest import nearest, scorer
from m3runtime.codecs.product.kernels.rotate import rotate_
from m3runtime.codecs.product.quantiser import Quantiser, Vectors
from m3runtime.codecs.product.residual import Level, of_levels, pack


@dataclass(frozen=True, eq=False)
class Tables:
    """The learned tensors for keys or for values: a vector ``x`` is quantised as ``(x - mean) @ rotation``, in levels.

    Each level quantises the residual: the difference between the vector and the centroids of the levels before it.
    """

    levels: tuple[Level, ...]
    centroids: tuple[Tensor, ...]  # of each level, float32[groups, parts, 2**bits, head_dim / parts]
    rotation: Tensor | None = None  # float32[groups, head_dim, head_dim], orthogonal
    mean: Tensor | None = None  # float32[groups, head_dim]

    @classmethod
    def of(cls, name: str, levels: tuple[Level, ...], tensors: Mapping[str, Tensor]) -> "Tables":
        """Undo `tensors`."""
        centroids = tuple(tensors[f"{name}.{i}"] for i in range(len(levels)))
        return cls(levels, centroids, tensors.get(f"{name}.rotation"), tensors.get(f"{name}.mean"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors, by names that begin with ``name``."""
        named = {f"{name}.{i}": table for i, table in enumerate(self.centroids)}
        more = {f"{name}.rotation": self.rotation, f"{name}.mean": self.mean}
        return named | {key: tensor for key, tensor in more.items() if tensor is not None}

    def to(self, device: torch.device) -> "Tables":
        """A copy on another device."""
        return self.of("", self.levels, {name: tensor.to(device) for name, tensor in self.tensors("").items()})

    @property
    def code_bytes(self) -> int:
        """Bytes of the code of one vector."""
        return sum(level.bytes for level in self.levels)

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Write the codes of vectors ``float32[heads, tokens, dim]`` to ``uint8[tokens, heads, bytes]``.

        All lie on one device; ``x`` may be overwritten. Tables of a whole model are those that faiss can have. For them
        all is computed in float64: the codes are the same on every device then, and are those of faiss but where two
        centroids are as near as float32 can tell. There faiss takes either, as its CPU rounds, and this the nearer.
        """
        groups, (heads, tokens, dim) = len(self.centroids[0]), x.shape
        x = x.to(self._dtype)
        if self.mean is not None:
            x -= self.mean.repeat_interleave(heads // groups, 0)[:, None]
        if self.rotation is not None:
            rotate_(x[None], self.rotation.to(x.dtype))
        left = x.view(groups, -1, dim)  # the heads of a group one after the other
        written = zip(self.levels, self.centroids, self._search, of_levels(out, self.levels), strict=True)
        for i, (level, table, (places, against), codes) in enumerate(written):
            numbers = torch.empty(left.shape[1], groups * level.parts, dtype=torch.int32, device=x.device)
            nearest(left, places, against, numbers)
            by_head = numbers.view(-1, tokens, groups, level.parts).permute(1, 2, 0, 3).flatten(1, 2)
            pack(by_head, level, codes)
            if i < len(self.levels) - 1:
                said = torch.empty(1, heads, tokens, dim, device=x.device)
                look_up(codes[None], [level], [table], said)
                x -= said[0]

    def decode(self, codes: Tensor, out: Tensor, add: Tensor | None = None) -> None:
        """Vectors of codes ``uint8[n, width, heads, bytes]`` to contiguous ``float32[n, heads, width, dim]``.

        ``add``, ``float32[n, heads, dim]``, is added at the end.
        """
        if self.rotation is None:
            look_up(codes, self.levels, self.centroids, out, add)
            return
        if self.mean is not None:
            mean = self.mean.repeat_interleave(codes.shape[2] // len(self.mean), 0)
            add = mean[None] if add is None else add + mean
        look_up(codes, self.levels, self.centroids, out)
        rotate_(out, self._back, add)

    def peak(self) -> float:
        """No decoded value exceeds it, before anything is added."""
        most = torch.stack([table.abs().amax(2).flatten(1) for table in self.centroids]).sum(0)
        if self.rotation is not None:  # all at their greatest, with the worst of signs
            most = (most[:, None] @ self._back.abs())[:, 0]
        if self.mean is not None:
            most = most + self.mean.abs()
        return float(most.max())

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if len(self.centroids[0]) == 1 else torch.float32

    @cached_property
    def _search(self) -> list[tuple[Tensor, Tensor]]:
        """For each level, the places of its parts and their tables as `nearest` takes them."""
        found = []
        for level, table in zip(self.levels, self.centroids, strict=True):
            groups, parts, _, size = table.shape
            places = level.places(groups, parts * size).to(table.device)
            found.append((places, scorer(table.flatten(0, 1).to(self._dtype))))
        return found

    @cached_property
    def _back(self) -> Tensor:
        assert self.rotation is not None, "asked for only where there is one"
        return self.rotation.transpose(1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class ResidualQuantiser(Quantiser):
    """Quantises every vector by itself: see `ResidualDesign`."""

    heads: int
    """Layers x KV heads."""
    keys: Tables
    values: Tables
    offset: Tensor | None  # float32[2, heads, head_dim]: the least mean of a memory's keys, and the step

    @property
    def exchangeable(self) -> bool:
        """True if faiss has an index for the same codes: see `m3runtime.codecs.product.faiss_exchange`."""
        few = max(len(self.keys.levels), len(self.values.levels)) <= 2
        return few and self.offset is None and len(self.keys.centroids[0]) == 1

    @property
    def fixed_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the offset, one for each channel: see `Quantiser`."""
        return 0 if self.offset is None else self.offset[0].numel()

    @property
    def token_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the codes of a token: see `Quantiser`."""
        return self.heads * (self.keys.code_bytes + self.values.code_bytes)

    @property
    def heads_of_bytes(self) -> Tensor:
        """All keys, then all values: see `Quantiser.heads_of_bytes`."""
        heads = torch.arange(self.heads)
        return torch.cat([heads.repeat_interleave(of.code_bytes) for of in (self.keys, self.values)])

    @cached_property
    def peak(self) -> float:  # type: ignore[override]
        """The greatest value that any bytes decode to: see `Quantiser`."""
        keys = self.keys.peak()
        if self.offset is not None:
            low, step = self.offset.abs()
            keys += float((low + 255 * step).max())
        return max(keys, self.values.peak())

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name: see `Quantiser.tensors`."""
        named = self.keys.tensors("keys") | self.values.tensors("values")
        return named if self.offset is None else named | {"offset": self.offset}

    def to(self, device: torch.device) -> "ResidualQuantiser":
        """A copy on another device: see `Quantiser.to`."""
        offset = None if self.offset is None else self.offset.to(device)
        return replace(self, keys=self.keys.to(device), values=self.values.to(device), offset=offset)

    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """Write the codes of one memory, on ``torch.get_num_threads()`` threads on a CPU: see `Quantiser.encode`."""
        keys, values = vectors
        key_codes, value_codes = self._codes(payload[None], keys.shape[1])
        if self.offset is not None:
            offset = offset_codes(keys, self.offset)
            keys -= offset_of(offset, self.offset)[:, None]
            payload[: self.fixed_bytes] = offset.flatten()
        self.keys.encode(keys, key_codes[0])
        self.values.encode(values, value_codes[0])

    def encode_all(self, vectors: Vectors, counts: Sequence[int], payloads: Tensor) -> None:
        """Write the codes of several memories: see `Quantiser.encode_all`.

        All at once where they are chosen in float64, and so by nothing but their own vectors.
        """
        if self.offset is not None or self.keys.centroids[0].shape[0] != 1:
            super().encode_all(vectors, counts, payloads)
            return
        together = torch.empty(sum(counts) * self.token_bytes, dtype=torch.uint8, device=payloads.device)
        self.encode(vectors, together)
        split = torch.split(together, [count * self.token_bytes for count in counts])
        for codes, payload in zip(split, payloads, strict=True):
            payload[: len(codes)] = codes

    def decode(self, payloads: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Vectors:  # noqa: ARG002
        """Vectors of payloads, in float32 on their device: see `Quantiser.decode`."""
        key_codes, value_codes = self._codes(payloads, width)
        add = None
        if self.offset is not None:
            fixed = torch.unflatten(payloads[:, : self.fixed_bytes], 1, (self.heads, -1))
            add = offset_of(fixed, self.offset)
        # In one piece: glibc gives two back to the system each time, and page faults cost more than all the rest.
        dim = self.keys.centroids[0][0, :, 0].numel()
        keys, values = torch.empty(2, len(payloads), self.heads, width, dim, device=payloads.device)
        self.keys.decode(key_codes, keys, add)
        self.values.decode(value_codes, values)
        return keys, values

    def _codes(self, payloads: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Views ``uint8[n, width, heads, bytes of a vector]`` of the codes of keys and values."""
        sizes = (self.heads * self.keys.code_bytes, self.heads * self.values.code_bytes)
        keys, values = layout.split(payloads, width, self.fixed_bytes, *sizes)
        return torch.unflatten(keys, 2, (self.heads, -1)), torch.unflatten(values, 2, (self.heads, -1))


def offset_codes(keys: Tensor, offset: Tensor) -> Tensor:
    """The mean of keys ``[heads, tokens, dim]`` in one byte each: ``uint8[heads, dim]``."""
    low, step = offset
    # A step of zero is that of a channel whose mean did not vary in the sample.
    codes = torch.round((keys.mean(1) - low) / torch.where(step == 0, 1, step))
    return codes.clamp(0, 255).to(torch.uint8)


def offset_of(codes: Tensor, offset: Tensor) -> Tensor:
    """The mean that `offset_codes` encoded, ``float32[..., heads, dim]``."""
    low, step = offset
    found: Tensor = codes.to(torch.float32) * step + low
    return found
