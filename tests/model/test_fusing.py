"""Layers compiled for the engine's steps: what they compute is the same, and they share their graphs."""

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from m3model.engine.fusing import fuse
from m3model.engine.packing import unpack
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig
from tests.model.families import FAMILIES, OTHERS, make_adapter, make_model, random_text

SETTINGS = GenerateConfig(max_new_tokens=6, log_probs=1)


class Graphs:
    """A compiler that runs graphs as they are, and counts those of layers."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, graph: Any, _: Any) -> Any:
        self.found.append(graph)
        return graph.forward


def plain(family: str) -> TransformersAdapter:
    """Without packed weights, as compiled layers are: these round otherwise."""
    adapter = make_adapter(family)
    assert unpack(adapter.model)
    return adapter


def answers(adapter: TransformersAdapter, rows: int) -> list[Any]:
    prompts = [Prompt(random_text(adapter.tokenizer, 9 + row, seed=row)) for row in range(rows)]
    return [(one.text, one.log_probs) for one in adapter.generate(prompts, None, SETTINGS)]


@pytest.mark.long
@pytest.mark.parametrize(
    "family", [one if one == "llama" else pytest.param(one, marks=pytest.mark.slow) for one in (*FAMILIES, *OTHERS)]
)
def test_compiled_layers_answer_as_the_model_does(family: str) -> None:
    torch.compiler.reset()
    expected = [answers(plain(family), rows) for rows in (1, 3)]
    adapter = make_adapter(family)
    graphs = Graphs()
    fuse(adapter.model, graphs)
    fuse(adapter.model, graphs)  # once is enough
    assert [answers(adapter, rows) for rows in (1, 2, 3)][::2] == expected
    found = len(graphs.found)
    assert found
    answers(adapter, 4)
    assert len(graphs.found) < 2 * found  # graphs hold for many numbers of rows and columns


@pytest.mark.long
def test_layers_share_their_graphs() -> None:
    counts = []
    for layers in (2, 5):
        torch.compiler.reset()
        config = copy.deepcopy(make_model("llama").config)
        config.num_hidden_layers = layers
        adapter = make_adapter(model=AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        graphs = Graphs()
        fuse(adapter.model, graphs)
        assert not unpack(adapter.model)
        answers(adapter, 2)
        counts.append(len(graphs.found))
    assert counts[0] == counts[1]


def test_layers_that_cannot_be_compiled_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no such compiler")

    torch.compiler.reset()
    adapter = make_adapter("llama")
    fuse(adapter.model, fails)
    with caplog.at_level(logging.WARNING, "m3runtime"):
        assert answers(adapter, 2) == answers(plain("llama"), 2)
    assert "decoding is slower" in caplog.text
