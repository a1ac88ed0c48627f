"""`Tables`: what a quantiser of single vectors learned for keys or for values, and what it does with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from m3runtime.codecs.kernels.lookup import look_up
from m3runtime.codecs.kernels.nearest import nearest, scorer
from m3runtime.codecs.product.packing import Stage, of_stages, pack
from m3runtime.codecs.product.rotation import rotate_


@dataclass(frozen=True, eq=False)
class Tables:
    """A vector ``x`` is quantised as ``(x - mean) @ rotation``, in stages."""

    stages: tuple[Stage, ...]
    centroids: tuple[Tensor, ...]  # of each stage, float32[groups, parts, 2**bits, head_dim / parts]
    rotation: Tensor | None  # float32[groups, head_dim, head_dim], orthogonal
    mean: Tensor | None  # float32[groups, head_dim]

    @classmethod
    def of(cls, name: str, stages: tuple[Stage, ...], tensors: Mapping[str, Tensor]) -> "Tables":
        """Undo `tensors`."""
        centroids = tuple(tensors[f"{name}.{i}"] for i in range(len(stages)))
        return cls(stages, centroids, tensors.get(f"{name}.rotation"), tensors.get(f"{name}.mean"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All there are, by names that begin with ``name``."""
        named = {f"{name}.{i}": table for i, table in enumerate(self.centroids)}
        more = {f"{name}.rotation": self.rotation, f"{name}.mean": self.mean}
        return named | {key: tensor for key, tensor in more.items() if tensor is not None}

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Codes of vectors ``float32[heads, tokens, dim]``, overwritten, to ``uint8[tokens, heads, bytes]``."""
        sharing = len(x) // len(self.centroids[0])
        if self.mean is not None:
            x -= self.mean.repeat_interleave(sharing, 0)[:, None]
        if self.rotation is not None:
            rotate_(x[None], self.rotation)
        written = zip(self.stages, self.centroids, self._scorers, of_stages(out, self.stages), strict=True)
        for i, (stage, table, against, codes) in enumerate(written):
            if stage.bits == 8:
                nearest(x, against, sharing, codes)
            else:
                numbers = torch.empty(*codes.shape[:2], stage.parts, dtype=torch.int32)
                nearest(x, against, sharing, numbers)
                pack(numbers, stage, codes)
            if i < len(self.stages) - 1:
                said = torch.empty_like(x)
                look_up(codes[None].to(x.device), [stage], [table], said[None])
                x -= said

    def decode(self, codes: Tensor, out: Tensor, add: Tensor | None = None) -> None:
        """Vectors of codes ``uint8[n, width, heads, bytes]`` to contiguous ``float32[n, heads, width, dim]``.

        ``add``, ``float32[n, heads, dim]``, is added at the end.
        """
        if self.rotation is None:
            look_up(codes, self.stages, self.centroids, out, add)
            return
        if self.mean is not None:
            mean = self.mean.repeat_interleave(codes.shape[2] // len(self.mean), 0)
            add = mean[None] if add is None else add + mean
        look_up(codes, self.stages, self.centroids, out)
        rotate_(out, self._back, add)

    def peak(self) -> float:
        """No decoded value exceeds it, before anything is added."""
        most = torch.stack([table.abs().amax(2).flatten(1) for table in self.centroids]).sum(0)
        if self.rotation is not None:  # all at their greatest, with the worst of signs
            most = (most[:, None] @ self._back.abs())[:, 0]
        if self.mean is not None:
            most = most + self.mean.abs()
        return float(most.max())

    @cached_property
    def _scorers(self) -> list[Tensor]:
        return [scorer(table) for table in self.centroids]

    @cached_property
    def _back(self) -> Tensor:
        assert self.rotation is not None, "asked for only where there is one"
        return self.rotation.transpose(1, 2).contiguous()
