"""`Units` and `Transform`: the vectors of a token that are transformed together, and the tensors that do it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors, budgets_of

CENTROIDS = 256
"""Centroids of a part: a code is a byte."""
WIDTHS = (1, 2, 3, 4, 6, 8)
"""Numbers of coordinates that can share a code."""


@dataclass(frozen=True, slots=True)
class Units:
    """A token's channels in units: one vector for each layer, or one for each key and each value of a head."""

    spec: MemorySpec
    together: str
    """``layer`` or ``head``."""

    @property
    def heads(self) -> int:
        """Layers x KV heads."""
        return self.spec.vectors_per_token

    @property
    def count(self) -> int:
        """Units of a token."""
        return len(self.spec.layers) if self.together == "layer" else 2 * self.heads

    @property
    def channels(self) -> int:
        """Channels of a unit."""
        return 2 * self.heads * self.spec.head_dim // self.count

    @property
    def budgets(self) -> Tensor:
        """The most tokens of each unit, ``int64[units]``."""
        budgets = budgets_of(self.spec)
        return budgets.flatten().repeat(2) if self.together == "head" else budgets[:, 0]

    def sample(self, memories: MemoryTensors, unit: int) -> Tensor:
        """The vectors of one unit of all tokens that it keeps of memories, ``float32[tokens, channels]`` on the CPU."""
        exists = memories.exists()
        layer = unit % self.heads // self.spec.kv_heads if self.together == "head" else unit
        of = [memories.keys, memories.values]
        if self.together == "head":
            head = unit % self.spec.kv_heads
            exists &= torch.arange(exists.shape[1]) < self.budgets[unit]
            return of[unit // self.heads][:, layer, head].cpu()[exists].float()
        both = [x[:, layer].transpose(1, 2).cpu()[exists].float().flatten(1) for x in of]
        return torch.cat(both, 1)

    def joined(self, keys: Tensor, values: Tensor) -> Tensor:
        """Vectors ``[layers * kv_heads, tokens, head_dim]`` as ``[units, tokens, channels]`` of the caller's own."""
        if self.together == "head":
            return torch.cat([keys, values])
        layers, heads = len(self.spec.layers), self.spec.kv_heads
        both = keys.new_empty(layers, keys.shape[1], 2, heads, self.spec.head_dim)
        for kind, x in enumerate((keys, values)):
            both[:, :, kind] = torch.unflatten(x, 0, (layers, heads)).transpose(1, 2)
        return both.view(layers, -1, self.channels)

    def put(self, x: Tensor, unit: int, keys: Tensor, values: Tensor) -> None:
        """Undo `joined` for one unit: copy ``[n, tokens, channels]`` to where it belongs in keys and values.

        Those are ``[n, layers * kv_heads, tokens, head_dim]``.
        """
        if self.together == "head":
            to = keys if unit < self.heads else values
            to[:, unit % self.heads].copy_(x)
            return
        heads = self.spec.kv_heads
        both = torch.unflatten(x, 2, (2, heads, self.spec.head_dim)).permute(2, 0, 3, 1, 4)
        for to, part in zip((keys, values), both, strict=True):
            to[:, unit * heads : (unit + 1) * heads].copy_(part)


@dataclass(frozen=True, eq=False)
class Transform:
    """The learned tensors. A token has a code for each part, in the order of ``parts``."""

    units: Units
    parts: Tensor  # int32[parts, 3] on the CPU: unit, first coordinate, coordinates; by width, unit, coordinate
    mean: Tensor  # float32[units, channels]
    forward: Tensor  # float32[kept coordinates of all units, channels]: x to coordinates
    inverse: Tensor  # float32[kept coordinates of all units, channels]: coordinates to x
    tables: tuple[Tensor, ...]  # of each width, float32[parts of that width, 256, width]

    @classmethod
    def of(cls, units: Units, tensors: Mapping[str, Tensor]) -> "Transform":
        """Undo `tensors`."""
        tables = tuple(tensors[f"width{width}"] for width in WIDTHS)
        return cls(units, tensors["parts"], tensors["mean"], tensors["forward"], tensors["inverse"], tables)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {"parts": self.parts, "mean": self.mean, "forward": self.forward, "inverse": self.inverse}
        return named | {f"width{width}": table for width, table in zip(WIDTHS, self.tables, strict=True)}

    def to(self, device: torch.device) -> "Transform":
        """A copy on another device, but for ``parts``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self.of(self.units, moved | {"parts": self.parts})


def kept_by(parts: Tensor, units: int) -> list[int]:
    """The number of coordinates that each unit keeps."""
    kept = [0] * units
    for unit, first, width in parts.tolist():
        kept[unit] = max(kept[unit], first + width)
    return kept
