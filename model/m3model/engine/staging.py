"""`Staging`: turns the plan of a step into its shape and its inputs, copied to the device at once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from m3model.engine.buffers import GRAIN, RowBuffers, rounded
from m3model.engine.sampling import Kinds
from m3model.engine.scheduler import Plan, Scheduled
from m3model.engine.step import Inputs, Shape


class Staging:
    """Writes inputs. Each call's are valid until the next but one. Not thread-safe.

    ``few_shapes`` rounds shapes up, so that a few captured steps serve all plans; otherwise nothing is computed that
    no sequence asked for.
    """

    def __init__(self, buffers: RowBuffers, *, few_shapes: bool) -> None:
        self._buffers = buffers
        self._few = few_shapes
        self._device = buffers.layout.device
        self._host: list[torch.Tensor] = []
        self._uniform: list[torch.Tensor] = []
        self._on_device = torch.empty(0, dtype=torch.int64, device=self._device)
        self._uniform_on_device = torch.empty(0, device=self._device)
        self._turn = 0

    def shape(self, plan: Plan, kinds: Kinds) -> Shape:
        """The shape of the step that does this work. The buffers have room for it."""
        decoding = max((one.row + 1 for one in plan.decoding if one.row is not None), default=0)
        width = max((part.end - part.start for part in plan.reading), default=0)
        parts, ends = len(plan.reading), sum(part.draws for part in plan.reading)
        context = max([one.read + 1 for one in plan.decoding] + [part.end for part in plan.reading])
        rows = max([decoding] + [part.sequence.row + 1 for part in plan.reading if part.sequence.row is not None])
        memories = self._buffers.used(rows)
        if self._few:
            decoding = min(_power(decoding), self._buffers.rows)
            parts, width = _power(parts), max(_power(width), GRAIN) if width else 0
            ends = parts if ends else 0
            context = min(_power(max(context, 4 * GRAIN)), self._buffers.context)
            memories = self._buffers.region
        return Shape(
            decoding=decoding,
            parts=parts,
            width=width,
            ends=ends,
            memories=memories,
            context=context,
            kinds=kinds,
            threads=torch.get_num_threads(),
        )

    def inputs(
        self,
        plan: Plan,
        shape: Shape,
        offset: Callable[[Scheduled], int],
        uniform: Callable[[Scheduled], float],
    ) -> Inputs:
        """The inputs of that step; ``offset`` is the position of a sequence's first token of context."""
        self.reserve(shape)
        sizes = _sizes(shape)
        host, drawn = self._host[self._turn], self._uniform[self._turn]
        self._turn = 1 - self._turn if self._device.type == "cuda" else 0
        prompts, positions, rows, columns, sees, part_rows, results, result_rows = np.split(
            host.numpy()[: sum(sizes)], np.cumsum(sizes)[:-1]
        )
        numbers = drawn.numpy()[: shape.results]
        # What belongs to no sequence: written beside all rows, and seeing the first column there is.
        nobody = self._buffers.rows
        prompts[:], positions[:], sees[:], part_rows[:], numbers[:] = 0, 0, 0, nobody, 0
        rows[:], columns[:], result_rows[:] = nobody, self._buffers.context, nobody
        results[: shape.decoding] = np.arange(shape.decoding)
        for one in plan.decoding:
            row = one.row
            positions[row] = offset(one) + one.read
            rows[row] = result_rows[row] = row
            columns[row] = sees[row] = one.read
            numbers[row] = uniform(one)
        for number, part in enumerate(plan.reading):
            one, count = part.sequence, part.end - part.start
            start = shape.decoding + number * shape.width
            at, places = slice(start, start + count), np.arange(part.start, part.end)
            prompts[at.start - shape.decoding : at.stop - shape.decoding] = one.tokens(part.start, part.end)
            positions[at] = offset(one) + places
            rows[at] = part_rows[number] = one.row
            columns[at] = sees[at] = places
        ends = [number for number, part in enumerate(plan.reading) if part.draws]
        results[shape.decoding :] = shape.decoding
        for place, number in enumerate(ends, shape.decoding):
            part = plan.reading[number]
            results[place] = shape.decoding + number * shape.width + part.end - part.start - 1
            result_rows[place] = part.sequence.row
            numbers[place] = uniform(part.sequence)
        return self._copied(host, drawn, sizes)

    def reserve(self, shape: Shape) -> bool:
        """Make room for the inputs of a shape; are inputs in another place now?

        There are two pieces of page-locked memory to write to: the copy out of the other one may be under way.
        """
        integers, floats = sum(_sizes(shape)), shape.results
        if integers <= len(self._on_device) and floats <= len(self._uniform_on_device):
            return False
        locked = self._device.type == "cuda"
        integers = max(rounded(integers, 4096), len(self._on_device))
        floats = max(rounded(floats, 256), len(self._uniform_on_device))
        self._host = [torch.zeros(integers, dtype=torch.int64, pin_memory=locked) for _ in range(2)]
        self._uniform = [torch.zeros(floats, pin_memory=locked) for _ in range(2)]
        if locked:
            self._on_device = self._on_device.new_zeros(integers)
            self._uniform_on_device = self._uniform_on_device.new_zeros(floats)
        else:
            self._on_device, self._uniform_on_device = self._host[0], self._uniform[0]
        return True

    def _copied(self, host: torch.Tensor, drawn: torch.Tensor, sizes: Sequence[int]) -> Inputs:
        if host is not self._on_device:
            self._on_device[: sum(sizes)].copy_(host[: sum(sizes)], non_blocking=True)
            self._uniform_on_device[: sizes[-1]].copy_(drawn[: sizes[-1]], non_blocking=True)
        views: list[torch.Tensor] = list(self._on_device[: sum(sizes)].split_with_sizes(list(sizes)))
        views.append(self._uniform_on_device[: sizes[-1]])
        return Inputs(*views)


def _sizes(shape: Shape) -> list[int]:
    """Integers of each of `Inputs`, in their order."""
    tokens, padded = shape.tokens, shape.parts * shape.width
    return [padded, tokens, tokens, tokens, tokens, shape.parts, shape.results, shape.results]


def _power(count: int) -> int:
    """The next power of two; 0 stays."""
    return 1 << (count - 1).bit_length() if count else 0
