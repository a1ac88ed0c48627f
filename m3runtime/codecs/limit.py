"""`ErrorLimit`: what a trained codec may lose of a memory, by what it lost of those that it was trained on.

A codec learns what its sample has. It ruins a memory of another kind, and neither the bytes nor the count of the sample
tell. So each memory is decoded again and compared: where it loses more than `MOST` times what is typical, another codec
must encode it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m3runtime.memory.tensors import MemoryTensors

MOST = 2.0
"""The greatest ratio of errors, the geometric mean over layers, keys and values."""
_HELD_OUT = 8
"""One of so many memories of a sample is kept from training, to measure on."""
_LEAST = 1e-12
"""Relative errors below it count as this."""


class ErrorLimit:
    """The limit of one codec. Thread-safe."""

    def __init__(self, typical: Sequence[float]) -> None:
        """``typical``: relative squared errors of the keys of each layer, then of the values."""
        self.typical = tuple(typical)
        self._log = torch.tensor(self.typical, dtype=torch.float64).clamp_min(_LEAST).log()

    @classmethod
    def of(cls, errors: Tensor) -> "ErrorLimit":
        """The limit whose typical errors are the mean of those of some memories: see `relative_errors`."""
        return cls(errors.mean(0).tolist())

    def ratios(self, errors: Tensor) -> Tensor:
        """How many times the typical error each memory has, ``float64[n]``: see `relative_errors`."""
        return (errors.clamp_min(_LEAST).log() - self._log).mean(1).exp()

    def exceeded(self, memories: MemoryTensors, decoded: MemoryTensors) -> list[int]:
        """The rows whose decoded memories lost too much."""
        over = self.ratios(relative_errors(memories, decoded)) > MOST
        return [row for row, lost in enumerate(over.tolist()) if lost]


def held_out(count: int) -> int:
    """The number of memories at the end of a sample that a codec does not train on: none of a single one."""
    return 0 if count == 1 else max(1, count // _HELD_OUT)


def relative_errors(memories: MemoryTensors, decoded: MemoryTensors) -> Tensor:
    """The relative squared error of each memory, ``float64[n, 2 * layers]`` on the CPU: all keys, then all values.

    Both lie on one device. What a memory's errors are does not depend on the others.
    """
    found = []
    for row, own in enumerate(memories.tokens.tolist()):
        parts = []
        for true, back in ((memories.keys, decoded.keys), (memories.values, decoded.values)):
            x = true[row, :, :, :own].float()
            error = (back[row, :, :, :own].float() - x).square().sum((1, 2, 3), dtype=torch.float64)
            parts.append(error / x.square().sum((1, 2, 3), dtype=torch.float64).clamp_min(1e-30))
        found.append(torch.cat(parts))
    if not found:
        return torch.zeros(0, 2 * memories.keys.shape[1], dtype=torch.float64)
    return torch.stack(found).cpu()
