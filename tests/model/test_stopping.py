"""Encoding stops where the last memory layer has its keys and values, and these are those of a whole pass."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from m3model.attention.cache import MemoryCache
from m3model.engine import encoding
from m3model.transformers import TransformersAdapter
from tests.model.families import FAMILIES, LAYERS, make_adapter

TEXTS = ["walnut oil", "the old town burns walnut oil and turns once an hour", "a heron"]


def layers_run(adapter: TransformersAdapter) -> list[int]:
    """Which layers an encoding goes through to their end."""
    run: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
        for number, layer in enumerate(adapter.model.get_decoder().layers)
    ]
    adapter.encode(TEXTS)
    for hook in hooks:
        hook.remove()
    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["all", "first-half", [0]])
@pytest.mark.parametrize("tokens", ["all", 3])
def test_memories_are_those_of_a_whole_pass(
    family: str, layers: object, tokens: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(family, layers=layers, tokens_per_head=tokens)
    stopped = adapter.encode(TEXTS)
    assert layers_run(adapter) == list(range(adapter.spec.layers[-1]))

    @contextlib.contextmanager
    def going_on(_: MemoryCache, __: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(encoding, "stopping_after", going_on)
    assert layers_run(adapter) == list(range(LAYERS))
    whole = adapter.encode(TEXTS)
    for kind in ("keys", "values", "tokens"):
        assert torch.equal(getattr(stopped, kind), getattr(whole, kind))
