"""The passes of training: fused attention sees what masks show, nothing waits for the device, layers compile."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3model.attention.compiled import Compiled
from m3model.attention.implementation import Weighing
from m3model.attention.passes import Masks, PassLayer, ReadMemories
from m3model.memory3 import Memory3ForCausalLM
from m3model.training.compiling import compile_training
from tests.model.families import REFERENCE_TOKENS
from tests.model.test_memory3 import CHUNK, batch, memory3

WAITS = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "is_nonzero", "equal"}
"""Operations that wait for a device, or have a result of a size that only it knows."""

NO_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""The compiler looks at it."""


def distinct(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its references once each, as `TrainingSequences.collate` gives them."""
    references, counts = inputs["references"].flatten(0, 1), inputs["reference_counts"].flatten()
    places = torch.arange(len(counts)).view(inputs["reference_counts"].shape)
    return {**inputs, "references": references, "reference_counts": counts, "reference_places": places}


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # unfused, as always on a CPU
@pytest.mark.parametrize("window", [None, 7])
def test_fused_attention_sees_what_the_mask_shows(window: int | None) -> None:
    lengths, chunks, sink = [[5, 2, 0], [1, 0, 4]], 2, 3
    text, width, heads, kv_heads, dim = 3 * 4, 5, 4, 2, 8
    random = torch.Generator().manual_seed(0)
    rows, number = len(lengths), 3 * len(lengths)
    part = (torch.randn(number, kv_heads, width, dim, generator=random) for _ in range(2))
    places = torch.arange(number).view(rows, 3)
    memories = ReadMemories({}, places, torch.tensor(lengths), width, chunk_tokens=4, chunks=chunks)
    own = [torch.randn(rows, h, sink + text, dim, generator=random) for h in (heads, kv_heads, kv_heads)]
    memory = (next(part), next(part))
    found = []
    for flexes in (True, False):
        masks = Masks(sink, torch.zeros(rows, sink + text), None, memories, flexes=flexes)
        layer = PassLayer(masks, memory, places)
        layer.begin(window, own[0])
        keys, values = layer.store(own[1], own[2])
        found.append(layer.attend(own[0], keys, values, window, Weighing(0.3)))
        # And by weighing that has no fused kernel: a cap that caps nothing.
        found.append(layer.attend(own[0], keys, values, window, Weighing(0.3, softcap=1e4)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0)


def test_distinct_references_are_the_same_as_each_by_itself() -> None:
    model, inputs = memory3(tokens=4), batch()
    wanted = model(**inputs)
    found = model(**distinct(inputs))
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Collects what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        if name in WAITS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    model, inputs = memory3(tokens=4), distinct(batch())
    model(**inputs)
    with Waits() as waits:
        model(**inputs).loss.backward()
    assert waits.found == []
    with Waits() as waits:  # and it would be seen
        model(**batch()).loss.item()
    assert waits.found == ["unique_dim", "_local_scalar_dense"]


def gradients(model: Memory3ForCausalLM, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), [one.grad for one in model.parameters()]


@NO_LEAF
def test_compiled_layers_are_the_layers_and_share_graphs() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = memory3("qwen3", tokens=4, layers=(0, 1, 2))
    compiled = copy.deepcopy(model)
    compile_training(compiled, backend)
    compile_training(compiled, backend)  # once is enough
    for lengths in ((8, 9, 0), (5, 14, 1)), ((3, 4, 5), (REFERENCE_TOKENS, 2, 0)):
        inputs = distinct(batch(lengths))
        loss, wanted = gradients(model, inputs)
        found_loss, found = gradients(compiled, inputs)
        assert found_loss == loss
        for one, other in zip(found, wanted, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
    # Of references, of text that reads memories, of text that does not, and of the loss.
    assert len(graphs) == 4


def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def backend(*_: Any) -> Any:
        raise ValueError("no such compiler")

    doubled = Compiled(lambda x: 2 * x, backend, "this")
    with caplog.at_level(logging.WARNING, "m3runtime"):
        assert [doubled(torch.tensor(number)).item() for number in (1, 2)] == [2, 4]
    assert len(caplog.records) == 1
    assert "no such compiler" in caplog.text


def test_more_chunks_than_text_are_passed_over() -> None:
    model, inputs = memory3(), batch()
    cut = {**inputs, "input_ids": inputs["input_ids"][:, : 2 * CHUNK], "labels": None}
    with torch.no_grad():
        whole = model(**inputs).logits[:, : 2 * CHUNK]
        torch.testing.assert_close(model(**cut).logits, whole, atol=1e-5, rtol=1e-5)
