"""What is compiled for training: each layer (norms, rotation, gates and residuals become a few kernels), and the loss.

Layers are compiled, not the model: all of a kind share one graph, and what stands around them (the choice of tokens,
and the pass that ends at the last memory layer) stays Python.
"""

import logging
from typing import Any

import torch

from m3model.attention.passes import PassLayer
from m3model.attention.versions import CACHE_NAMES
from m3model.memory3 import Memory3ForCausalLM

log = logging.getLogger("m3runtime")


class Compiled:
    """A function that is compiled when it is first called, or runs as it is, with a warning, if that fails then.

    What is compiled later, a backward pass or for other shapes, has no such way out: ``train.compile: false`` has.
    """

    def __init__(self, plain: Any, backend: Any) -> None:
        """``backend`` is that of `torch.compile`."""
        self._plain = plain
        self._compiled: Any = torch.compile(plain, backend=backend)
        self._works = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if self._works:
            return self._compiled(*args, **kwargs)
        try:
            found = self._compiled(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - of many types; and if it is not the compiler's, it comes again
            log.warning("training is slower, for it cannot be compiled: %s: %s", type(error).__name__, error)
            self._compiled = self._plain
            found = self._plain(*args, **kwargs)
        self._works = True
        return found


class _CompiledLayer:
    """Stands for the ``forward`` of a layer: compiled in the passes of training, and as it was in all others."""

    def __init__(self, forward: Any, backend: Any) -> None:
        self._forward = forward
        self._compiled = Compiled(forward, backend)

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
            one.loss_function = Compiled(one.loss_function, backend)
