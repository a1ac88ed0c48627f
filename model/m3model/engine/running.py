"""`Runner`: launches steps on the buffers of an engine, and brings what they drew to the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3model.attention.slots import MemorySlots
from m3model.engine.buffers import RowBuffers
from m3model.engine.graph import GraphedStep
from m3model.engine.sampling import Chosen, Kinds, Sampling
from m3model.engine.scheduler import Plan, Scheduled
from m3model.engine.staging import Staging
from m3model.engine.step import Step
from m3runtime.adapters.answers import TokenLogProb
from m3runtime.config.schema import GenerateConfig
from m3runtime.device.side_stream import SideStream

Array = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Results:
    """What a step drew, on the host."""

    tokens: list[int]
    log_probs: list[float] | None = None
    likeliest: list[list[int]] | None = None
    likeliest_log_probs: list[list[float]] | None = None
    shares: Array | None = None
    """The share of each column of memories, see `m3model.engine.step.StepCache.shares`."""

    def token(self, index: int, log_probs: int | None) -> tuple[int, TokenLogProb | None]:
        """A token, and how likely it was, with so many of the likeliest; None asks for neither."""
        token = self.tokens[index]
        if log_probs is None or self.log_probs is None or self.likeliest is None or self.likeliest_log_probs is None:
            return token, None
        best = zip(self.likeliest[index][:log_probs], self.likeliest_log_probs[index][:log_probs], strict=True)
        return token, TokenLogProb(token, self.log_probs[index], tuple(best))

    def shares_of(self, index: int, slots: MemorySlots) -> dict[int, float]:
        """The share of attention that each memory in these slots got from a token's query."""
        shares: dict[int, float] = {}
        if self.shares is not None:
            columns = self.shares[index]
            for id, slot in slots:
                share = columns[len(columns) - slot.end : len(columns) - slot.start].sum()
                shares[id] = shares.get(id, 0.0) + float(share)
        return shares


class Outcome:
    """The tokens of a step that may still be under way."""

    def __init__(
        self,
        chosen: Chosen | None,
        places: Mapping[Scheduled, int],
        slots: Mapping[Scheduled, MemorySlots],
        mark: Callable[[], torch.Event | None],
    ) -> None:
        """``mark`` gives an event after all that was asked of the device, or None where nothing waits."""
        self.places = places
        """The sequences that a token is drawn for, and its place in the results."""
        self.slots = slots
        """The memories that they read in this step: others may be in their slots before its results are known."""
        names = [] if chosen is None else [one.name for one in fields(chosen)]
        self._host = {name: _to_host(getattr(chosen, name)) for name in names}
        # Of a step that draws nothing as well: the inputs of a later one are written where its own may still be read.
        self._event = mark()

    def results(self) -> Results:
        """Wait for the step, and for its tokens if it draws any."""
        if self._event is not None:
            self._event.synchronize()
        told: dict[str, Any] = {name: None if x is None else x.tolist() for name, x in self._host.items()}
        if (shares := self._host.get("shares")) is not None:
            told["shares"] = shares.numpy()  # many numbers, of which few are looked at
        return Results(**told) if told else Results([])


class Runner:
    """The buffers and the step of one engine. One thread."""

    def __init__(self, model: Any, buffers: RowBuffers) -> None:
        device = buffers.layout.device
        self.runs_ahead = device.type == "cuda"
        """May a step be launched before the results of the last one are known?"""
        # The head may have more entries than the vocabulary, or fewer.
        vocabulary = getattr(model.get_output_embeddings(), "out_features", model.config.get_text_config().vocab_size)
        self.sampling = Sampling(device, vocabulary)
        self._buffers = buffers
        self._step = Step(model, buffers, self.sampling)
        self._run: Step | GraphedStep = GraphedStep(self._step) if self.runs_ahead else self._step
        self._staging = Staging(buffers, few_shapes=self.runs_ahead)
        self._side = SideStream(device)

    def reserve(
        self, rows: int, region: int, context: int, settings: GenerateConfig, *, room: int | None = None
    ) -> None:
        """Make room for so many rows, columns of memories and tokens of context, and for what a row asks for.

        See `RowBuffers.reserve` for ``room``.
        """
        moved = self._buffers.reserve(rows, region, context, room=room)
        moved |= self.sampling.reserve(self._buffers.rows, Kinds.of([settings]))
        moved |= self._step.reserve(self._buffers.rows)
        if moved:
            self._forget_addresses()

    def drop(self) -> None:
        """Drop the buffers of keys and values. Nothing is under way."""
        self._forget_addresses()
        self._buffers.drop()

    def _forget_addresses(self) -> None:
        if isinstance(self._run, GraphedStep):
            self._run.clear()

    def wipe(self, row: int) -> None:
        """Forget what a row has written, and what belongs to no sequence."""
        self._buffers.wipe(row)
        self._buffers.wipe(self._buffers.rows)

    def move(self, row: int, to: int, tokens: int) -> None:
        """Move a row with ``tokens`` tokens of context to another one, which is free."""
        self._buffers.move(row, to, tokens)
        self.sampling.move(row, to)
        self._step.move(row, to)

    def launch(
        self,
        plan: Plan,
        settings: Sequence[GenerateConfig],
        *,
        offset: Callable[[Scheduled], int],
        uniform: Callable[[Scheduled], float],
        slots: Callable[[Scheduled], MemorySlots],
    ) -> Outcome:
        """Launch a step, which there is room for. ``settings`` are of the rows that it draws for."""
        shape = self._staging.shape(plan, Kinds.of(settings))
        if self._staging.reserve(shape):
            self._forget_addresses()
        places = {one: one.row for one in plan.decoding if one.row is not None}
        ends = (part.sequence for part in plan.reading if part.draws)
        places |= {one: place for place, one in enumerate(ends, shape.decoding)}
        chosen = self._run(shape, self._staging.inputs(plan, shape, offset, uniform))
        return Outcome(chosen, places, {one: slots(one) for one in places}, self._side.mark)


def _to_host(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
