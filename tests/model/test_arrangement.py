"""Memories in other places than those they were computed in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m3model.engine.session import Session
from m3model.transformers import TransformersAdapter
from m3runtime.errors import ConfigError
from tests.model.families import FAMILIES, OTHERS, REFERENCE_TOKENS, make_adapter, make_model, random_text

BY = -REFERENCE_TOKENS


def parts(adapter: TransformersAdapter, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    texts = [random_text(adapter.tokenizer, 5 + 3 * seed, seed=seed) for seed in range(1, count + 1)]
    memories = adapter.encode(texts)
    return [
        (memories.keys[row, :, :, :tokens], memories.values[row, :, :, :tokens])
        for row, tokens in enumerate(memories.tokens.tolist())
    ]


def logits(adapter: TransformersAdapter, memories: list[tuple[Tensor, Tensor]]) -> Tensor:
    session = adapter.session(1)
    session.read([memories])
    ids = adapter.tokenizer(random_text(adapter.tokenizer, 9, seed=9), add_special_tokens=False)["input_ids"]
    return session.all_logits(torch.tensor([ids]))[0]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_a_moved_key_is_the_key_of_a_token_that_stands_there(family: str) -> None:
    adapter = make_adapter(family, positions="sequential")
    tokens = torch.tensor([adapter.tokenizer(random_text(adapter.tokenizer, 11, seed=1))["input_ids"]])

    def keys_at(offset: int) -> Tensor:
        session = Session(adapter.model, batch=1, offset=offset)
        session.feed(tokens)
        of = range(adapter.layout.layers)
        return torch.stack([adapter.layout.packed(session.cache.context(layer))[0][0] for layer in of])

    arrange = adapter.session(1).arrange
    assert arrange is not None
    there = keys_at(40)
    moved = arrange.moved(keys_at(40 - BY), BY)
    assert (moved - there).abs().max() < 1e-4
    assert (keys_at(40 - BY) - there).abs().max() > 1e-2, "keys that do not turn with their position"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_in_sequence_the_best_memory_stays_and_others_stand_before_it(family: str) -> None:
    parallel, sequential = make_adapter(family), make_adapter(family, positions="sequential")
    (best, second) = parts(parallel)
    arrange = sequential.session(1).arrange
    assert arrange is not None
    by_hand = [best, (arrange.moved(second[0], BY), second[1])]
    assert torch.allclose(logits(sequential, [best, second]), logits(parallel, by_hand), atol=1e-4)
    assert torch.allclose(logits(sequential, [best]), logits(parallel, [best]), atol=1e-5)
    # The order says nothing in parallel, and something in sequence.
    assert torch.allclose(logits(parallel, [second, best]), logits(parallel, [best, second]), atol=1e-4)
    assert not torch.allclose(logits(sequential, [second, best]), logits(sequential, [best, second]), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"layers": (1, 3)}])
def test_a_sink_of_its_own_stands_before_each_memory(options: dict[str, Any]) -> None:
    once, each = make_adapter("llama", **options), make_adapter("llama", sinks="each", **options)
    sink = Session(once.model, batch=1)
    sink.feed(torch.tensor([once.sink_ids]))
    layers = once.spec.layers
    keys, values = (torch.stack([sink.cache.context(layer)[kind][0] for layer in layers]) for kind in range(2))
    memories = parts(once)
    by_hand = [(torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)) for k, v in memories]
    assert torch.allclose(logits(each, memories), logits(once, by_hand), atol=1e-5)
    assert not torch.allclose(logits(each, memories), logits(once, memories), atol=1e-3)


def test_no_memories_can_be_arranged_too() -> None:
    once, other = make_adapter("llama"), make_adapter("llama", sinks="each", positions="sequential")
    assert torch.equal(logits(other, []), logits(once, []))


def test_keys_that_cannot_be_moved_are_refused() -> None:
    model = make_model("llama")
    model.config.no_rope_layers = [1, 0, 1, 1]
    try:
        with pytest.raises(ConfigError, match=r"memory\.positions must be parallel"):
            make_adapter("llama", model=model, positions="sequential")
    finally:
        del model.config.no_rope_layers
