"""What a `m3runtime.codecs.transform.TransformDesign` becomes by training: codes of a token's vectors, and back."""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3runtime.codecs.allocation import WIDTHS
from m3runtime.codecs.lookup import compiled, share_out
from m3runtime.codecs.nearest import nearest, nearest_at, scorer
from m3runtime.codecs.quantiser import Quantiser, Vectors

if TYPE_CHECKING:
    from m3runtime.codecs.transform import TransformDesign
    from m3runtime.codecs.transform_triton import TritonDecoder

log = logging.getLogger("m3runtime")

CENTROIDS = 256
_TILE = 32
"""Rows of a matrix product. Always as many, because a product may round otherwise in another shape."""
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
        n, _, width, head_dim = keys.shape
        codes = torch.unflatten(payloads[:, : width * self.token_bytes], 1, (width, self.token_bytes))
        # One memory at a time: each table then comes into the cache once for all of its tokens.
        rows = -(-width // _TILE) * _TILE
        coordinates = torch.zeros(self.design.units, rows, self._places.gather.shape[1], device=payloads.device)
        for i in range(n):
            self._look_up(codes[i], coordinates)
            for start in range(0, width, _TILE):
                tile = coordinates[:, start : start + _TILE]
                some = slice(start, min(start + _TILE, width))
                x = torch.baddbmm(self.mean[:, None], tile, self._padded_inverse)[:, : some.stop - start]
                for out, part in zip((keys, values), self.design.parted(x), strict=True):
                    out[i, :, some].view(*part.shape[:-1], head_dim).copy_(part)

    def _look_up(self, codes: Tensor, out: Tensor) -> None:
        """Put what codes ``uint8[tokens, parts]`` stand for into ``float32[units, at least tokens, kept]``.

        What a unit does not keep, and rows beyond these tokens, stay as they are. numba and torch give equal numbers.
        """
        if codes.device.type == "cpu" and compiled():
            from m3runtime.codecs.scatter_kernel import scatter

            of = (codes.numpy(), self.parts.numpy(), self._starts.numpy(), self._flat.numpy(), out.numpy())
            share_out(lambda first, end: scatter(*of, first, end), len(self.parts), out.numel())
        else:
            out[:, : len(codes)] = self._coordinates(codes)

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
    def _starts(self) -> Tensor:
        """Where the centroids of each part begin in `_flat`, ``int64[parts]``."""
        sizes = self.parts[:, 2].to(torch.int64) * CENTROIDS
        return sizes.cumsum(0) - sizes

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
        from m3runtime.codecs.transform_triton import TritonDecoder

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
