"""What is compiled for training: each layer (norms, rotation, gates and residuals become a few kernels), and the loss.

Layers are compiled, not the model: all of a kind share one graph, and what stands around them (the choice of tokens,
and the pass that ends at the last memory layer) stays Python.
"""

from typing import Any

import torch

from m3model.attention.compiled import Compiled
from m3model.attention.passes import PassLayer
from m3model.attention.versions import CACHE_NAMES
from m3model.memory3 import Memory3ForCausalLM

_WHAT = "training"


class _CompiledLayer:
    """Stands for the ``forward`` of a layer: compiled in the passes of training, and as it was in all others."""

    def __init__(self, forward: Any, backend: Any) -> None:
        self._forward = forward
        self._compiled = Compiled(forward, backend, _WHAT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.get("m3_cache")
        if own is None:  # the warmup
            run = self._compiled if torch.is_grad_enabled() else self._forward
            return run(*args, **kwargs)
        if not isinstance(own, PassLayer) or own.is_last:
            return self._forward(*args, **kwargs)
        # The whole pass would be given by its number to each layer, which then had a graph of its own.
        return self._compiled(*args, **{**kwargs, **{name: own for name in CACHE_NAMES if name in kwargs}})


def compile_training(model: Memory3ForCausalLM, backend: Any = "inductor") -> None:
    """Compile layers and loss of a model at their first use. What fails in a first call runs as it is, with a warning.

    Calling it again is fine. ``backend`` is that of `torch.compile`.
    """
    for layer in model.get_decoder().layers:
        if not isinstance(layer.forward, _CompiledLayer):
            layer.forward = _CompiledLayer(layer.forward, backend)
    for one in (model, model.language_model):
        if not isinstance(one.loss_function, Compiled):
            one.loss_function = Compiled(one.loss_function, backend, _WHAT)
