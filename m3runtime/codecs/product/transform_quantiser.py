"""`TransformQuantiser`: the trained state of a `TransformDesign`. It encodes a token's vectors and decodes them."""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.codecs.product.kernels.nearest import nearest, scorer
from m3runtime.codecs.product.kernels.sharing import compiled, share_out
from m3runtime.codecs.product.quantiser import Quantiser, Vectors
from m3runtime.codecs.product.transform import CENTROIDS, Transform, kept_by

if TYPE_CHECKING:
    from m3runtime.codecs.product.kernels.by_triton import TritonDecoder

log = logging.getLogger("m3runtime")

Finder = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Finds nearest centroids: see `m3runtime.codecs.product.kernels.nearest_by_triton.nearest`."""

_TILE = 32
"""Rows of a matrix product. Always as many, because a product may round otherwise in another shape."""
_APART = 16
"""Numbers between the rows that a matrix product reads."""


@dataclass(frozen=True, eq=False)
class TransformQuantiser(Quantiser):
    """Quantises the vectors of a token together: see `TransformDesign`."""

    transform: Transform

    fixed_bytes = 0

    @property
    def token_bytes(self) -> int:  # type: ignore[override]
        """One byte for each part: see `Quantiser`."""
        return len(self.transform.parts)

    @property
    def heads_of_bytes(self) -> Tensor:
        """The heads of the parts' units: see `Quantiser.heads_of_bytes`."""
        return self.transform.parts[:, 0].long() % self.transform.units.heads

    @cached_property
    def peak(self) -> float:  # type: ignore[override]
        """All coordinates at their greatest, with the worst of signs: see `Quantiser`."""
        most = [table.abs().amax(1).flatten() for table in self.transform.tables]
        highest = torch.cat([*most, self.transform.mean.new_zeros(1)])[self._gather]
        added = torch.einsum("uc,ucn->un", highest, self._padded_inverse.abs())
        return float((self.transform.mean.abs() + added).max())

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name: see `Quantiser.tensors`."""
        return self.transform.tensors()

    def to(self, device: torch.device) -> "TransformQuantiser":
        """A copy on another device: see `Quantiser.to`."""
        return TransformQuantiser(self.transform.to(device))

    def encode(self, vectors: Vectors, payload: Tensor) -> None:
        """Write the codes of one memory, on ``torch.get_num_threads()`` threads on a CPU: see `Quantiser.encode`."""
        x = self.transform.units.joined(*vectors)
        x -= self.transform.mean[:, None]
        coordinates = torch.bmm(x, self._padded_forward)  # [units, tokens, kept]
        numbers = torch.empty(x.shape[1], self.token_bytes, dtype=torch.int32, device=x.device)
        at = 0
        for places, against in self._search:
            nearest(coordinates, places, against, numbers[:, at : at + len(places)])
            at += len(places)
        payload.view(numbers.shape).copy_(numbers)

    def encode_all(self, vectors: Vectors, counts: Sequence[int], payloads: Tensor) -> None:
        """Write the codes of several memories, with the kernel all at once: see `Quantiser.encode_all`."""
        if self._finder is None:
            super().encode_all(vectors, counts, payloads)
            return
        codes = self._codes(self.transform.units.joined(*vectors), self._finder)
        for own, payload in zip(torch.split(codes, list(counts)), payloads, strict=True):
            payload[: own.numel()] = own.flatten()

    def _codes(self, x: Tensor, finder: "Finder") -> Tensor:
        """The codes of ``[units, tokens, channels]``, ``uint8[tokens, parts]``; each depends on its token alone."""
        x -= self.transform.mean[:, None]
        count = x.shape[1]
        tiles = torch.unflatten(torch.nn.functional.pad(x, (0, 0, 0, -count % _TILE)), 1, (-1, _TILE))
        coordinates = x.new_empty(*tiles.shape[:3], self._gather.shape[1])
        for own, forward, out in zip(tiles, self._padded_forward, coordinates, strict=True):
            torch.bmm(own, forward.expand(len(own), -1, -1), out=out)
        codes = torch.empty(count, self.token_bytes, dtype=torch.uint8, device=x.device)
        at = 0
        for places, against in self._search:
            finder(coordinates.flatten(1, 2), places, against, codes[:, at : at + len(places)])
            at += len(places)
        return codes

    def decode(self, payloads: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Vectors:
        """Vectors of payloads, on their device: see `Quantiser.decode`. The kernel gives them in ``dtype``."""
        units = self.transform.units
        shape = (len(payloads), units.heads, width, units.spec.head_dim)
        made = torch.float32 if self._kernel is None else dtype
        keys, values = (torch.empty(shape, dtype=made, device=payloads.device) for _ in range(2))
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
        x = keys.new_empty(n * rows // _TILE, _TILE, self.transform.units.channels)
        # One unit of all memories at a time: its matrix and its centroids are loaded into the cache once then.
        for unit, coordinates in enumerate(self._by_unit(codes, rows)):
            inverse = self._padded_inverse[unit, : coordinates.shape[2]]
            mean = self.transform.mean[unit].expand(len(coordinates), _TILE, -1)
            torch.baddbmm(mean, coordinates, inverse.expand(len(coordinates), -1, -1), out=x)
            self.transform.units.put(x.view(n, rows, -1)[:, :width], unit, keys, values)

    def _by_unit(self, codes: Tensor, rows: int) -> Iterator[Tensor]:
        """The coordinates of each unit of codes ``uint8[n, width, parts]``, ``float32[n * rows / 32, 32, kept]``.

        Rows beyond a memory's tokens have no meaning. Each tensor is valid until the next is asked for. numba and torch
        give equal numbers.
        """
        n, width, _ = codes.shape
        most = self._gather.shape[1]
        if codes.device.type == "cpu" and compiled():
            from m3runtime.codecs.product.kernels.by_numba import scatter

            # Not a power of two apart, or rows would drive each other out of the cache.
            out = torch.zeros(n * rows, most + _APART)
            for kept, parts, starts, gapless in self._of_units:
                if not gapless:
                    out.zero_()
                of = (codes.numpy(), parts, starts, self._flat.numpy(), out.numpy())
                share_out(partial(scatter(), *of), n * width, n * width * kept)
                yield out.view(-1, _TILE, out.shape[1])[:, :, :kept]
            return
        every = codes.new_zeros(self.transform.units.count, n, rows, most, dtype=torch.float32)
        for i in range(n):
            every[:, i, :width] = self._coordinates(codes[i])
        for unit, kept in enumerate(self._kept):
            yield every[unit].view(-1, _TILE, most)[:, :, :kept]

    def _coordinates(self, codes: Tensor) -> Tensor:
        """The coordinates of codes ``uint8[tokens, parts]``, ``float32[units, tokens, kept]``; zero beyond a unit's."""
        at, found = 0, []
        for table in self.transform.tables:
            count, _, width = table.shape
            rows = codes[:, at : at + count] + torch.arange(0, count * CENTROIDS, CENTROIDS, device=codes.device)
            found.append(torch.nn.functional.embedding(rows, table.view(-1, width)).flatten(1))
            at += count
        found.append(torch.zeros(len(codes), 1, device=codes.device))
        places = self._gather
        return torch.cat(found, 1)[:, places.flatten()].view(len(codes), *places.shape).transpose(0, 1)

    # -- derived from the transform, once ---------------------------------------------------------------------------

    @cached_property
    def _kept(self) -> list[int]:
        """Coordinates that each unit keeps."""
        return kept_by(self.transform.parts, self.transform.units.count)

    @cached_property
    def _gather(self) -> Tensor:
        """The place of each unit's coordinates in the order of parts, ``int64[units, most kept]``.

        A coordinate that no part covers is the zero after all others.
        """
        parts = self.transform.parts
        found = torch.full((len(self._kept), max(1, *self._kept)), int(parts[:, 2].sum()))
        at = 0
        for unit, first, width in parts.tolist():
            found[unit, first : first + width] = torch.arange(at, at + width)
            at += width
        return found.to(self.transform.mean.device)

    def _padded(self, rows: Tensor) -> Tensor:
        """``[coordinates of all units, n]`` as ``[units, most kept, n]``, zeros where a unit keeps fewer."""
        result = rows.new_zeros(*self._gather.shape, rows.shape[1])
        for unit, own in enumerate(torch.split(rows, self._kept)):
            result[unit, : len(own)] = own
        return result

    @cached_property
    def _padded_forward(self) -> Tensor:
        """``float32[units, channels, kept]``."""
        return self._padded(self.transform.forward).transpose(1, 2).contiguous()

    @cached_property
    def _padded_inverse(self) -> Tensor:
        """``float32[units, kept, channels]``."""
        return self._padded(self.transform.inverse)

    @cached_property
    def _search(self) -> list[tuple[Tensor, Tensor]]:
        """For each width with parts, their places and tables as `nearest` takes them."""
        found = []
        for table in filter(len, self.transform.tables):
            parts = self.transform.parts[self.transform.parts[:, 2] == table.shape[2], :2].long()
            places = torch.column_stack([parts, torch.arange(len(parts))])
            found.append((places.to(table.device), scorer(table)))
        return found

    @cached_property
    def _flat(self) -> Tensor:
        """All centroids, ``float32[-1]``."""
        return torch.cat([table.flatten() for table in self.transform.tables])

    @cached_property
    def _of_units(self) -> list[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64], bool]]:
        """For each unit: its coordinates, its parts and their starts as the kernel takes them; True without gaps."""
        parts = self.transform.parts.long()
        sizes = parts[:, 2] * CENTROIDS
        starts = sizes.cumsum(0) - sizes
        found = []
        for unit, kept in enumerate(self._kept):
            own = (parts[:, 0] == unit).nonzero()[:, 0]
            places = torch.column_stack([own, parts[own, 1:]]).contiguous()
            found.append((kept, places.int().numpy(), starts[own].numpy(), int(places[:, 2].sum()) == kept))
        return found

    @cached_property
    def _kernel(self) -> "TritonDecoder | None":
        """The kernel that decodes on a CUDA device, where Triton compiles it."""
        return kernel_of(self.transform) if self.transform.mean.device.type == "cuda" else None

    @cached_property
    def _finder(self) -> "Finder | None":
        """The kernel that finds codes on a CUDA device, where Triton compiles it."""
        if self._kernel is None:
            return None
        from m3runtime.codecs.product.kernels.nearest_by_triton import nearest

        return nearest


def kernel_of(transform: Transform) -> "TritonDecoder | None":
    """The Triton kernel of a transform on a CUDA device; None without Triton, and with a warning where that fails.

    It may: some versions need a C compiler, and none knows every device.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from m3runtime.codecs.product.kernels.by_triton import TritonDecoder

        return TritonDecoder(transform)
    except Exception as error:  # noqa: BLE001 - no types of error are documented
        log.warning("Triton failed, so torch decodes memories, more slowly: %s: %s", type(error).__name__, error)
        return None
