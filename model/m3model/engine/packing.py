"""Linear layers that multiply packed weights on a CPU, see `m3runtime.device.packed`.

A step of few rows takes half to three quarters of the time with them. The weights themselves stay: embeddings, training
and fingerprints read them. What is mapped from a file may leave memory, for nothing else reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m3runtime.device.packed import PackedWeight


class _PackedForward:
    """Stands for the ``forward`` of a linear layer, wherever no gradients are asked for and nothing is compiled."""

    def __init__(self, layer: nn.Linear, packed: PackedWeight) -> None:
        self._layer = layer
        self._plain = layer.forward
        self._dtype = layer.weight.dtype
        self._packed: PackedWeight | None = packed
        self._of: tuple[int, int] | None = _state(layer.weight)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model packs weights of its own, once it multiplies."""
        return {**vars(self), "_packed": None, "_of": None}

    def __call__(self, input: Tensor) -> Tensor:  # named as the layer's own is
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or input.dtype is not self._dtype:
            return self._plain(input)
        layer = self._layer
        if self._of != (state := _state(layer.weight)):  # it was trained, or others were loaded
            self._packed, self._of = PackedWeight.of(layer.weight), state
        if self._packed is None or input.dim() < 2:
            return self._plain(input)
        return self._packed.product(input, layer.bias)


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes with the values of a weight, but for one that was made in inference mode and is written in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def pack(model: Any) -> None:
    """Pack the weights of a model's linear layers, where they are on a CPU. Calling it again is fine."""
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            packed = PackedWeight.of(layer.weight)
            if packed is not None:
                layer.forward = _PackedForward(layer, packed)  # type: ignore[method-assign]


def unpack(model: Any) -> list[tuple[Any, Any]]:
    """Give a model the library's own products again. Returns the layers that had others, and those."""
    layers = [layer for layer in model.modules() if isinstance(vars(layer).get("forward"), _PackedForward)]
    return [(layer, vars(layer).pop("forward")) for layer in layers]


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Let the model compute by the library's own products in the block. No other thread runs it meanwhile."""
    layers = unpack(model)
    try:
        yield
    finally:
        for layer, forward in layers:
            layer.forward = forward
