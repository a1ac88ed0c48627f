"""`TransformQuantiser`: the trained state of a `TransformDesign`. It encodes a token's vectors and decodes them."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.codecs.kernels.lookup import compiled, share_out
from m3runtime.codecs.kernels.nearest import nearest, nearest_at, scorer
from m3runtime.codecs.product.allocation import WIDTHS
from m3runtime.codecs.product.quantiser import Quantiser, Vectors

if TYPE_CHECKING:
    from m3runtime.codecs.kernels.transform_triton import TritonDecoder
    from m3runtime.codecs.product.transform import TransformDesign

Numbers = npt.NDArray[np.integer[Any]]

log = logging.getLogger("m3runtime")

CENTROIDS = 256
_TILE = 32
"""Rows of a matrix product. Always as many, because a product may round otherwise in another shape."""
_APART = 16
"""Numbers between the rows that a matrix product reads."""
_AT_ONCE = 16
"""Codes that `nearest` finds by one call."""


@dataclass(frozen=True, eq=False)
class TransformQuantiser(Quantiser):
    """See `TransformDesign`. A token's codes are those of all parts, in the order of ``parts``."""

    design: "TransformDesign"
    parts: Tensor  # int32[parts, 3] on the CPU: unit, first coordinate, coordinates; by width, unit, coordinate
    mean: Tensor  # float32[units, channels]
    forward: Tensor  # float32[kept coordinates of all units, channels]: x to coordinates
    inverse: Tensor  # float32[kept coordinates of all units, channels]: coordinates to x
    tables: tuple[Tensor, ...]  # of each width, float32[parts of that width, 256, width]
    _places: "_Places" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", _Places(self.parts, self.design.units, self.mean.device))

    @classmethod
    def of(cls, design: "TransformDesign", tensors: Mapping[str, Tensor]) -> "TransformQuantiser":
        """From tensors by name."""
        tables = tuple(tensors[f"width{width}"] for width in WIDTHS)
        return cls(design, tensors["parts"], tensors["mean"], tensors["forward"], tensors["inverse"], tables)

    @property
    def fixed_bytes(self) -> int:  # type: ignore[override]
        """See `Quantiser`: none."""
        return 0

    @property
    def token_bytes(self) -> int:  # type: ignore[override]
        """See `Quantiser`: one byte for each part."""
        return len(self.parts)

    @cached_property
    def peak(self) -> float:  # type: ignore[override]
        """See `Quantiser`: all coordinates at their greatest, with the worst of signs."""
        most = [table.abs().amax(1).flatten() for table in self.tables]
        highest = torch.cat([*most, self.mean.new_zeros(1)])[self._places.gather]
        return float((self.mean.abs() + torch.einsum("uc,ucn->un", highest, self._padded_inverse.abs())).max())

    def tensors(self) -> dict[str, Tensor]:
        """See `Quantiser.tensors`."""
        named = {"parts": self.parts, "mean": self.mean, "forward": self.forward, "inverse": self.inverse}
        return named | {f"width{width}": table for width, table in zip(WIDTHS, self.tables, strict=True)}

    def to(self, device: torch.device) -> "TransformQuantiser":
        """See `Quantiser.to`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items() if name != "parts"}
        return self.of(self.design, {"parts": self.parts, **moved})

    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """See `Quantiser.encode`. On ``torch.get_num_threads()`` threads on a CPU."""
        x = self.design.joined(*vectors)
        x -= self.mean[:, None]
        tokens = x.shape[1]
        coordinates = torch.bmm(x, self._padded_forward)  # [units, tokens, kept]
        if x.device.type == "cpu" and compiled():
            codes = payload.view(tokens, 1, self.token_bytes)
            at = 0
            for places, tables in self._where:
                nearest_at(coordinates, places, tables, codes[:, :, at : at + len(places)])
                at += len(places)
            return
        flat = coordinates.transpose(0, 1).reshape(tokens, -1)[:, self._places.scatter]
        codes = payload.view(tokens, self.token_bytes)
        start = at = 0
        for width, against in zip(WIDTHS, self._scorers, strict=True):
            count = self.tables[WIDTHS.index(width)].shape[0]
            if not count:
                continue
            groups = len(against)
            some = torch.zeros(tokens, groups * _AT_ONCE * width, device=x.device)
            some[:, : count * width] = flat[:, start : start + count * width]
            by_group = some.view(tokens, groups, -1).transpose(0, 1).contiguous()
            found = torch.empty(tokens, groups, _AT_ONCE, dtype=torch.uint8)
            nearest(by_group, against, 1, found)
            codes[:, at : at + count] = found.flatten(1)[:, :count]
            start, at = start + count * width, at + count

    def decode(self, payloads: Tensor, width: int) -> Vectors:
        """See `Quantiser.decode`."""
        shape = (len(payloads), self.design.heads, width, self.design.spec.head_dim)
        keys, values = (torch.empty(shape, device=payloads.device) for _ in range(2))
        if self._kernel is None:
            self._decode(payloads, keys, values)
        else:
            self._kernel(payloads, keys, values)
        return keys, values

    def _decode(self, payloads: Tensor, keys: Tensor, values: Tensor) -> None:
        """`decode` in torch, on any device, into ``float32[n, layers * kv_heads, width, head_dim]``."""
        n, _, width, _ = keys.shape
        if not n:
            return
        codes = torch.unflatten(payloads[:, : width * self.token_bytes], 1, (width, self.token_bytes))
        rows = -(-width // _TILE) * _TILE
        # One unit of all memories at a time: its matrix and its centroids then come into the cache once.
        for unit, coordinates in enumerate(self._by_unit(codes, rows)):
            inverse = self._padded_inverse[unit, : coordinates.shape[2]]
            mean = self.mean[unit].expand(len(coordinates), _TILE, -1)
            x = torch.baddbmm(mean, coordinates, inverse.expand(len(coordinates), -1, -1))
            self.design.put(x.view(n, rows, -1)[:, :width], unit, keys, values)

    def _by_unit(self, codes: Tensor, rows: int) -> Iterator[Tensor]:
        """Of each unit what codes ``uint8[n, width, parts]`` stand for, ``float32[n * rows / 32, 32, coordinates]``.

        Rows beyond a memory's tokens have no meaning. Each tensor is valid until the next is asked for. numba and torch
        give equal numbers.
        """
        n, width, _ = codes.shape
        if codes.device.type == "cpu" and compiled():
            from m3runtime.codecs.kernels.scatter_numba import scatter

            # Not a power of two apart, or rows would drive each other out of the cache.
            out = torch.zeros(n * rows, self._places.gather.shape[1] + _APART)
            for kept, parts, starts, gapless in self._units:
                if not gapless:
                    out.zero_()
                of = (codes.numpy(), parts, starts, self._flat.numpy(), out.numpy())
                share_out(partial(scatter, *of), n * width, n * width * kept)
                yield out.view(-1, _TILE, out.shape[1])[:, :, :kept]
            return
        every = codes.new_zeros(self.design.units, n, rows, self._places.gather.shape[1], dtype=torch.float32)
        for i in range(n):
            every[:, i, :width] = self._coordinates(codes[i])
        for unit, kept in enumerate(self._places.kept):
            yield every[unit].view(-1, _TILE, every.shape[3])[:, :, :kept]

    def _coordinates(self, codes: Tensor) -> Tensor:
        """Of codes ``uint8[tokens, parts]``, ``float32[units, tokens, kept]``: zero where a unit keeps fewer."""
        at, found = 0, []
        for table in self.tables:
            count, _, width = table.shape
            rows = codes[:, at : at + count] + torch.arange(0, count * CENTROIDS, CENTROIDS, device=codes.device)
            found.append(torch.nn.functional.embedding(rows, table.view(-1, width)).flatten(1))
            at += count
        found.append(torch.zeros(len(codes), 1, device=codes.device))
        places = self._places.gather
        return torch.cat(found, 1)[:, places.flatten()].view(len(codes), *places.shape).transpose(0, 1)

    @cached_property
    def _flat(self) -> Tensor:
        """All centroids, ``float32[-1]``."""
        return torch.cat([table.flatten() for table in self.tables])

    @cached_property
    def _units(self) -> list[tuple[int, Numbers, Numbers, bool]]:
        """Of each unit: its coordinates, its parts and their starts as the kernel takes them, and whether no gap is."""
        sizes = self.parts[:, 2].to(torch.int64) * CENTROIDS
        starts = sizes.cumsum(0) - sizes
        found = []
        for unit, kept in enumerate(self._places.kept):
            own = (self.parts[:, 0] == unit).nonzero()[:, 0]
            parts = torch.column_stack([own.to(torch.int32), self.parts[own, 1:]]).contiguous()
            found.append((kept, parts.numpy(), starts[own].numpy(), int(parts[:, 2].sum()) == kept))
        return found

    @cached_property
    def _kernel(self) -> "TritonDecoder | None":
        """What decodes on a CUDA device, where Triton makes code for it."""
        return kernel_of(self) if self.mean.device.type == "cuda" else None

    @cached_property
    def _padded_forward(self) -> Tensor:
        """``float32[units, channels, kept]``."""
        return self._places.padded(self.forward).transpose(1, 2).contiguous()

    @cached_property
    def _padded_inverse(self) -> Tensor:
        """``float32[units, kept, channels]``."""
        return self._places.padded(self.inverse)

    @cached_property
    def _where(self) -> list[tuple[Tensor, Tensor]]:
        """Of each width that there is, what `nearest_at` looks for, and in what."""
        found = []
        for width, against in zip(WIDTHS, self._scorers, strict=True):
            parts = self.parts[self.parts[:, 2] == width]
            places = torch.column_stack([parts[:, :2].to(torch.int64), torch.arange(len(parts))])
            if len(parts):
                found.append((places, against.flatten(0, 1)))
        return found

    @cached_property
    def _scorers(self) -> list[Tensor]:
        """Of each width, what `nearest` compares with: ``_AT_ONCE`` parts in a group, the last filled up."""
        found = []
        for table in self.tables:
            more = -len(table) % _AT_ONCE
            whole = torch.cat([table, table.new_zeros(more, *table.shape[1:])])
            found.append(scorer(whole.view(-1, _AT_ONCE, *table.shape[1:])))
        return found


def kernel_of(quantiser: TransformQuantiser) -> "TritonDecoder | None":
    """The Triton kernel of a quantiser on a CUDA device; None without Triton, and with a warning where that fails.

    It may: some versions need a C compiler, and none knows every device.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from m3runtime.codecs.kernels.transform_triton import TritonDecoder

        return TritonDecoder(quantiser)
    except Exception as error:  # noqa: BLE001 - no types of error are documented
        log.warning("Triton failed, so torch decodes memories, more slowly: %s: %s", type(error).__name__, error)
        return None


class _Places:
    """Where coordinates stand: in the order of units, and in that of parts."""

    def __init__(self, parts: Tensor, units: int, device: torch.device) -> None:
        self.kept = kept_by(parts, units)
        most = max(1, *self.kept) if self.kept else 1
        total = int(parts[:, 2].sum())
        gather = torch.full((units, most), total)  # of what no part covers: a zero behind all coordinates
        scatter: list[int] = []
        at = 0
        for unit, first, width in parts.tolist():
            gather[unit, first : first + width] = torch.arange(at, at + width)
            scatter.extend(range(unit * most + first, unit * most + first + width))
            at += width
        self.gather = gather.to(device)  # int64[units, most]: where a unit's coordinate is among the parts'
        self.scatter = torch.tensor(scatter, dtype=torch.int64, device=device)  # and back

    def padded(self, rows: Tensor) -> Tensor:
        """``[coordinates of all units, n]`` as ``[units, most, n]``, zeros where a unit keeps fewer."""
        result = rows.new_zeros(*self.gather.shape, rows.shape[1])
        for unit, own in enumerate(torch.split(rows, self.kept)):
            result[unit, : len(own)] = own
        return result


def kept_by(parts: Tensor, units: int) -> list[int]:
    """How many coordinates each unit keeps."""
    kept = [0] * units
    for unit, first, width in parts.tolist():
        kept[unit] = max(kept[unit], first + width)
    return kept
