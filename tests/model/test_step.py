"""A step of the engine can be captured: what that asks of it shows on a CPU as well."""

import gc
import weakref
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3model.engine.buffers import RowBuffers
from m3model.engine.graph import GraphedStep
from m3model.engine.running import Outcome, Runner
from m3model.engine.sampling import Chosen, Kinds
from m3model.engine.scheduler import Plan, Reading, Scheduled
from m3model.engine.staging import Staging
from m3model.engine.step import Inputs, Shape, Step
from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import GenerateConfig
from tests.model.families import FAMILIES, OTHERS, make_adapter, make_uneven, random_text
from tests.model.test_decode_step import PRODUCTS, WAITING, Operations

EVERYTHING = GenerateConfig(
    temperature=0.8, top_p=0.9, top_k=7, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={3: 1.0},
    log_probs=2, grounding=True,
)  # fmt: skip


class Ready:
    """An engine's buffers with two rows that decode, with memories, and one that reads its prompt."""

    def __init__(self, adapter: TransformersAdapter) -> None:
        self.adapter = adapter
        self.buffers = RowBuffers(adapter.layout, adapter.spec.layers, adapter._sink, budgets=adapter._columns)
        self.runner = Runner(adapter.model, self.buffers)
        self.runner.reserve(3, 64, 64, EVERYTHING)
        texts = [random_text(adapter.tokenizer, length, seed=length) for length in (20, 11)]
        encoded = adapter.encode(texts)
        parts = [
            (keys[:, :, :count], values[:, :, :count])
            for keys, values, count in zip(encoded.keys, encoded.values, encoded.tokens.tolist(), strict=True)
        ]
        self.rows = [Scheduled(adapter.ids(random_text(adapter.tokenizer, 20 + i, seed=i)), 99, None) for i in range(3)]
        for row, one in enumerate(self.rows):
            one.row = row
            self.buffers.begin(row, sink=True)
            self.runner.sampling.begin(row, EVERYTHING, one.prompt, ())
            self.buffers.put_memories(row, parts[: row % 3], ["a", "b"][: row % 3], [0.0, -0.5][: row % 3])
        for one in self.rows[:2]:
            self.step(Plan((), (Reading(one, 0, len(one.prompt)),)))

    def plan(self) -> Plan:
        """The two that decode, and a part of the third one's prompt."""
        third = self.rows[2]
        return Plan(tuple(self.rows[:2]), (Reading(third, third.read, third.read + 3),))

    def inputs(self, plan: Plan) -> tuple[Shape, Inputs]:
        shape = self.runner._staging.shape(plan, Kinds.of([EVERYTHING]))
        return shape, self.runner._staging.inputs(plan, shape, lambda _: self.adapter.offset, lambda _: 0.3)

    def step(self, plan: Plan) -> Any:
        with torch.inference_mode():
            chosen = self.runner._step(*self.inputs(plan))
        for one in plan.decoding:
            one.read, one.drawn = one.read + 1, one.drawn + 1
        for part in plan.reading:
            part.sequence.read = part.end
            part.sequence.drawn += part.end == len(part.sequence.prompt)
        return chosen

    def addresses(self) -> list[int]:
        sampling, stacks = self.runner.sampling, self.buffers.stacks
        tensors = [self.runner._step.last, self.buffers.bias, *(x for s in stacks for x in (s.keys, s.values))]
        tensors += [] if self.buffers.lacking is None else [self.buffers.lacking.added]
        tensors += [sampling._settings, sampling._top_k, sampling._prompted, sampling._written, sampling._bias]
        return [tensor.data_ptr() for tensor in tensors]


class Made(TorchDispatchMode):
    """Remembers every tensor that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.tensors.append(weakref.ref(one))
        return result


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, "llama budgets", "gpt_oss-sliding budgets"])
def test_a_step_waits_for_nothing_and_keeps_nothing(family: str) -> None:
    ready = Ready(make_uneven(family))
    before = ready.addresses()
    for _ in range(2):
        with Operations() as step:
            ready.step(ready.plan())
        assert not WAITING & step.names.keys()
        assert not PRODUCTS.isdisjoint(step.names)  # the step was seen at all
        # Decoding rows read their keys where they stand: no copy of a layer's columns for two rows.
        layout = ready.adapter.layout
        assert [shape for shape in step.shapes if len(shape) == 4 and shape[0] == 2 and shape[2] > 60] == []
        assert layout.layers
    assert ready.addresses() == before
    with Made() as made:
        chosen = ready.step(ready.plan())
    assert len(made.tensors) > 100
    results = {getattr(chosen, one.name) for one in fields(chosen)}
    assert chosen.shares.shape == (2, ready.buffers.used(3))
    gc.collect()
    alive = {tensor for reference in made.tensors if (tensor := reference()) is not None}
    model = ready.adapter.model
    there = {*before, *(tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()])}
    assert {tensor for tensor in alive if tensor.data_ptr() not in there} <= results


@pytest.mark.parametrize(
    "family",
    [
        one if one in ("llama", "gemma3_text", "llama budgets") else pytest.param(one, marks=pytest.mark.slow)
        for one in (*FAMILIES, *OTHERS, "llama budgets")
    ],
)
def test_a_step_is_one_graph(family: str) -> None:
    """No data-dependent Python: `torch.compile` follows the whole step, and gets what it gets without."""
    torch.compiler.reset()  # it compiles one function for a few models, not for a dozen
    ready, other = Ready(make_uneven(family)), Ready(make_uneven(family))
    compiled = torch.compile(other.runner._step, fullgraph=True, backend="eager")
    for _ in range(2):
        expected = ready.step(ready.plan())
        with torch.inference_mode():
            found = compiled(*other.inputs(other.plan()))
        for one in other.rows[:2]:
            one.read, one.drawn = one.read + 1, one.drawn + 1
        other.rows[2].read += 3
        assert found.tokens[:2].tolist() == expected.tokens[:2].tolist()
        torch.testing.assert_close(found.log_probs[:2], expected.log_probs[:2], atol=1e-5, rtol=1e-5)


class Remembering(GraphedStep):
    """Checks that a shape finds its inputs where they were when it was captured."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.places: dict[Shape, list[int]] = {}
        self.cleared = 0

    def clear(self) -> None:
        self.cleared += 1
        self.places.clear()

    def __call__(self, shape: Shape, inputs: Inputs) -> Chosen | None:
        places = [getattr(inputs, one.name).data_ptr() for one in fields(inputs) if shape.parts or one.name == "rows"]
        assert self.places.setdefault(shape, places) == places
        return self._step(shape, inputs)


def test_captured_steps_find_their_inputs_where_they_were() -> None:
    ready = Ready(make_adapter())
    ready.runner._run = graphed = Remembering(ready.runner._step)
    ready.runner._staging = Staging(ready.buffers, few_shapes=True)
    ready.runner.reserve(3, 64, 512, GenerateConfig())
    launch = partial(ready.runner.launch, settings=[], offset=lambda _: 0, uniform=lambda _: 0.0, slots=lambda _: ())
    with torch.inference_mode():
        small = ready.plan()
        launch(small)
        cleared = graphed.cleared
        long = [Scheduled([5] * 512, 9, None, row=row) for row in range(3)]
        launch(Plan((), tuple(Reading(one, 0, 400) for one in long)))
        assert graphed.cleared > cleared
        launch(small)
        launch(small)


def test_a_step_that_draws_nothing_is_waited_for_too() -> None:
    """Or the step after the next would overwrite inputs that it has still to read."""

    class Mark:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

    mark: Any = Mark()
    Outcome(None, {}, {}, lambda: mark).results()
    assert mark.waited == 1
