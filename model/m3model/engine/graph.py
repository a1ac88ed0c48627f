"""`GraphedStep`: replays steps as CUDA graphs, so that a step costs one launch and not hundreds."""

import gc
import warnings
from dataclasses import dataclass

import torch

from m3model.engine.sampling import Chosen
from m3model.engine.step import Inputs, Shape, Step

_MOST = 64
"""Graphs that are kept; each has memory of its own for results only, the rest is shared."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    chosen: Chosen | None


class GraphedStep:
    """A `Step` on a CUDA device. A shape is run eagerly the first time, which warms it up, and captured the second.

    Where a model's step cannot be captured, it runs eagerly from then on, after one warning. Not thread-safe.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen: set[Shape] = set()
        self._captured: dict[Shape, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._works = True

    def clear(self) -> None:
        """Drop what was captured: a buffer is in another place now."""
        self._captured.clear()
        # With its last graph a pool ends, and torch refuses to capture into it again.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, shape: Shape, inputs: Inputs) -> Chosen | None:
        """See `Step.__call__`. The result is valid until the next step of this shape."""
        if shape in self._captured:
            one = self._captured[shape]
            one.graph.replay()
            return one.chosen
        if not self._works or shape not in self._seen or len(self._captured) == _MOST:
            self._seen.add(shape)
            return self._step(shape, inputs)
        try:
            self._captured[shape] = one = self._capture(shape, inputs)
        except RuntimeError as error:
            self._works = False
            warnings.warn(
                f"this model's step cannot be captured as a CUDA graph, so each token costs more: {error}", stacklevel=2
            )
            torch.cuda.synchronize()
            return self._step(shape, inputs)
        one.graph.replay()
        return one.chosen

    def _capture(self, shape: Shape, inputs: Inputs) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a tensor that is collected while a graph is captured would break it
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            chosen = self._step(shape, inputs)
        return _Captured(graph, chosen)
