"""The default of the `product` codec: vectors of a token are transformed together, and bytes go where errors cost most.

An error ``e`` of a token's keys and values in one layer costs ``e @ importance @ e``. In coordinates in which that is
the plain squared error and which are uncorrelated (a Karhunen-Loève transform after whitening by the importance), each
can be quantised for itself, and `m3runtime.codecs.allocation` says with how many bits. So all heads of a layer share
what they have in common, a layer that matters gets more bytes than one that does not, and what no query looks at gets
none.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from m3runtime.codecs.allocation import WIDTHS
from m3runtime.codecs.base import Progress
from m3runtime.codecs.nearest import nearest, scorer
from m3runtime.codecs.quantiser import Design, Quantiser, Vectors, check_tensors
from m3runtime.errors import CodecError
from m3runtime.spec import MemorySpec

if TYPE_CHECKING:
    from m3runtime.codecs.transform_triton import TritonDecoder

log = logging.getLogger("m3runtime")

CENTROIDS = 256
TOGETHER = ("layer", "head")
_SHARE = 41 / 64
"""Bytes for each channel of a head, key and value together, by default."""
_TILE = 32
"""Rows of a matrix product. Always as many, because a product may round otherwise in another shape."""
_AT_ONCE = 16
"""Codes that `nearest` finds by one call."""


class TransformDesign(Design):
    """A key and a value of one head in ``bytes`` bytes together, on average over layers and heads.

    The default is a little less than a sixth of what they take in bfloat16: 41 for a head of 64 channels.

    With ``together="layer"`` keys and values of all heads of a layer are one vector; with ``head`` each key and each
    value is one by itself: less to compute, and more bytes for the same error. Raises `CodecError` for options that do
    not fit the spec.
    """

    names: ClassVar[Sequence[str]] = ("parts", "mean", "forward", "inverse", *(f"width{width}" for width in WIDTHS))

    def __init__(self, spec: MemorySpec, bytes: int | None = None, together: str = "layer") -> None:
        super().__init__(spec)
        bytes = max(1, round(_SHARE * spec.head_dim)) if bytes is None else bytes
        if isinstance(bytes, bool) or bytes not in range(1, 2 * spec.head_dim + 1):
            most = 2 * spec.head_dim
            raise CodecError(f"bytes of the product codec must be a whole number from 1 to {most}, not {bytes!r}")
        if together not in TOGETHER:
            raise CodecError(f"together of the product codec must be one of {', '.join(TOGETHER)}, not {together!r}")
        self.bytes = bytes
        self.together = together
        self.heads = spec.vectors_per_token
        self.units = len(spec.layers) if together == "layer" else 2 * self.heads
        self.channels = 2 * self.heads * spec.head_dim // self.units

    @property
    def options(self) -> Mapping[str, Any]:
        """See `Design.options`."""
        return {"bytes": self.bytes, "together": self.together}

    @property
    def fixed_bytes(self) -> int:
        """See `Design.fixed_bytes`: none."""
        return 0

    @property
    def token_bytes(self) -> int:
        """See `Design.token_bytes`."""
        return self.bytes * self.heads

    def fit(
        self, memories: Sequence[Vectors], importance: Tensor | None, progress: Progress | None
    ) -> "TransformQuantiser":
        """See `Design.fit`. Without importance, errors cost what they are relative to the vectors of their head."""
        from m3runtime.codecs.transform_training import trained  # the only part that needs faiss

        sample = torch.cat([self.joined(*vectors) for vectors in memories], 1)
        return TransformQuantiser(self, **trained(sample, self._blocks(importance, sample), self.token_bytes, progress))

    def restore(self, tensors: Mapping[str, Tensor]) -> "TransformQuantiser":
        """See `Design.restore`."""
        parts = tensors.get("parts")
        if parts is None or parts.dtype != torch.int32 or parts.ndim != 2 or parts.shape[1] != 3:
            raise CodecError("tensor 'parts' is not int32 [parts, 3]")
        listed = parts.tolist()
        width = [part[2] for part in listed]
        fit = all(0 <= u < self.units and 0 <= f < f + w <= self.channels and w in WIDTHS for u, f, w in listed)
        if not fit or len(listed) > self.token_bytes or listed != sorted(listed, key=_order):
            raise CodecError("tensor 'parts' does not describe parts of these vectors")
        rows = sum(_kept(parts, self.units))
        wanted: dict[str, tuple[int, ...]] = {
            "mean": (self.units, self.channels),
            "forward": (rows, self.channels),
            "inverse": (rows, self.channels),
        }
        wanted |= {f"width{size}": (width.count(size), CENTROIDS, size) for size in WIDTHS}
        check_tensors({name: tensor for name, tensor in tensors.items() if name != "parts"}, wanted)
        return TransformQuantiser.of(self, tensors)

    # -- a token's vectors in units -----------------------------------------------------------------------------

    def joined(self, keys: Tensor, values: Tensor) -> Tensor:
        """Vectors ``[layers * kv_heads, tokens, head_dim]`` as ``[units, tokens, channels]``."""
        if self.together == "head":
            return torch.cat([keys, values])
        layers, heads = len(self.spec.layers), self.spec.kv_heads
        both = torch.cat([torch.unflatten(x, 0, (layers, heads)) for x in (keys, values)], 1)
        return both.transpose(1, 2).reshape(layers, -1, self.channels)

    def parted(self, x: Tensor) -> Vectors:
        """Undo `joined`, of ``[units, tokens, channels]``: views."""
        if self.together == "head":
            return x[: self.heads], x[self.heads :]
        both = torch.unflatten(x, 2, (2, self.spec.kv_heads, self.spec.head_dim)).permute(2, 0, 3, 1, 4)
        keys, values = both  # [layers, kv_heads, tokens, head_dim]
        return keys, values

    def _blocks(self, importance: Tensor | None, sample: Tensor) -> Tensor:
        """What errors cost, ``float64[units, channels, channels]``."""
        n = 2 * self.spec.kv_heads * self.spec.head_dim
        if importance is None:
            centred = (sample - sample.mean(1, keepdim=True)).double()
            power = torch.unflatten(centred.square().mean(1), 1, (-1, self.spec.head_dim))
            weight = 1 / power.sum(2, keepdim=True).clamp_min(1e-12)
            return torch.diag_embed(weight.expand_as(power).flatten(1))
        if importance.shape != (len(self.spec.layers), n, n) or not torch.isfinite(importance).all():
            raise CodecError(f"importance must be finite [{len(self.spec.layers)}, {n}, {n}]")
        if self.together == "layer":
            return importance.double()
        dim = self.spec.head_dim
        blocks = importance.view(-1, 2, self.spec.kv_heads, dim, 2, self.spec.kv_heads, dim)
        own = torch.stack([blocks[:, kind, h, :, kind, h] for kind in (0, 1) for h in range(self.spec.kv_heads)], 1)
        keys_first = torch.unflatten(own, 1, (2, self.spec.kv_heads)).transpose(0, 1)
        return keys_first.reshape(self.units, dim, dim).double()


@dataclass(frozen=True, eq=False)
class TransformQuantiser(Quantiser):
    """See `TransformDesign`. A token's codes are those of all parts, in the order of ``parts``."""

    design: TransformDesign
    parts: Tensor  # int32[parts, 3] on the CPU: unit, first coordinate, coordinates; by width, unit, coordinate
    mean: Tensor  # float32[units, channels]
    forward: Tensor  # float32[kept coordinates of all units, channels]: x to coordinates
    inverse: Tensor  # float32[kept coordinates of all units, channels]: coordinates to x
    tables: tuple[Tensor, ...]  # of each width, float32[parts of that width, 256, width]
    _places: "_Places" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_places", _Places(self.parts, self.design.units, self.mean.device))

    @classmethod
    def of(cls, design: TransformDesign, tensors: Mapping[str, Tensor]) -> "TransformQuantiser":
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
        x = self.design.joined(*vectors) - self.mean[:, None]
        tokens = x.shape[1]
        coordinates = torch.bmm(x, self._padded_forward)  # [units, tokens, kept]
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
        units, kept = self._places.gather.shape
        for row in range(n):
            for start in range(0, width, _TILE):
                tokens = min(_TILE, width - start)
                tile = torch.zeros(_TILE, units * kept, device=payloads.device)
                tile[:tokens] = self._coordinates(codes[row, start : start + tokens])
                by_unit = tile.view(_TILE, units, kept).transpose(0, 1)
                x = torch.baddbmm(self.mean[:, None], by_unit, self._padded_inverse)[:, :tokens]
                for out, part in zip((keys, values), self.design.parted(x), strict=True):
                    out[row, :, start : start + tokens].view(*part.shape[:-2], tokens, head_dim).copy_(part)

    def _coordinates(self, codes: Tensor) -> Tensor:
        """Of codes ``uint8[tokens, parts]``, ``float32[tokens, units * kept]``: zero where a unit keeps fewer."""
        tokens, at = len(codes), 0
        found = []
        for table in self.tables:
            count, _, width = table.shape
            rows = codes[:, at : at + count] + torch.arange(0, count * CENTROIDS, CENTROIDS, device=codes.device)
            found.append(torch.nn.functional.embedding(rows, table.view(-1, width)).flatten(1))
            at += count
        found.append(torch.zeros(tokens, 1, device=codes.device))
        return torch.cat(found, 1)[:, self._places.gather.flatten()]

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
        self.kept = _kept(parts, units)
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


def _kept(parts: Tensor, units: int) -> list[int]:
    """How many coordinates each unit keeps."""
    kept = [0] * units
    for unit, first, width in parts.tolist():
        kept[unit] = max(kept[unit], first + width)
    return kept


def _order(part: Sequence[int]) -> tuple[int, int, int]:
    unit, first, width = part
    return width, unit, first
