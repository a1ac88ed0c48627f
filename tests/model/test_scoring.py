"""How likely a continuation is: the same as when it is decoded token by token, memories and all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from m3model.engine.sampling import Chosen, Sampling
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import GenerateConfig, MemoryConfig
from m3runtime.errors import InputError
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from tests.model.banks import CHUNK, make_runtime
from tests.model.families import make_adapter, make_model, oracle, random_text

FEW_FAMILIES = ["llama", "mistral-sliding", "gemma3_text"]
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2]
"""Tokens of the continuations: within a chunk, at its ends, over several."""


@pytest.fixture
def runtime_of(tmp_path: Path) -> Iterator[Callable[..., Runtime]]:
    with ExitStack() as closing:

        def opened(adapter: TransformersAdapter, **options: Any) -> Runtime:
            texts = [random_text(adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
            return closing.enter_context(make_runtime(adapter, tmp_path / "bank", texts, **options))

        yield opened


def decoded(
    adapter: TransformersAdapter, runtime: Runtime | None, prompt: Prompt, tokens: Sequence[int]
) -> tuple[list[float], list[tuple[int, ...]]]:
    """Decode exactly these tokens: how likely each was, and what was recalled on the way."""
    log_probs: list[float] = []

    ahead = iter(tokens)

    def choose(_: Sampling, logits: Tensor, *__: object) -> Chosen:
        token = next(ahead)
        log_probs.append(float(logits[0].log_softmax(-1)[token]))
        return Chosen(torch.tensor([token]))

    settings = GenerateConfig(max_new_tokens=len(tokens))
    with patch.object(Sampling, "choose", choose), ExitStack() as closing:
        streams = [closing.enter_context(runtime.stream(adapter.dtype))] if runtime else None
        (answer,) = adapter.generate([prompt], streams, settings)
    assert len(log_probs) == len(tokens)
    return log_probs, [chunk.ids for chunk in answer.chunks]


@pytest.mark.parametrize("recall", [None, {}, {"chunk_tokens": 1, "lookahead_tokens": 0}, {"choose_early": True}])
@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_a_score_is_what_decoding_the_continuation_gives(
    family: str, recall: dict[str, int] | None, runtime_of: Callable[..., Runtime]
) -> None:
    adapter = make_adapter(family)
    runtime = None if recall is None else runtime_of(adapter, score_temperature=0.1, **recall)
    texts = [random_text(adapter.tokenizer, length, seed=50 + length) for length in LENGTHS]
    prompts = [
        Prompt(random_text(adapter.tokenizer, 3 * length + 2, seed=length), query="a bell" if length % 2 else None)
        for length in LENGTHS
    ]
    with ExitStack() as closing:
        streams = [closing.enter_context(runtime.stream(adapter.dtype)) for _ in prompts] if runtime else None
        scores = adapter.score(prompts, texts, streams)
    recalls = set()
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        tokens = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected, chunks = decoded(adapter, runtime, prompt, tokens)
        torch.testing.assert_close(torch.tensor(score.log_probs), torch.tensor(expected), atol=1e-4, rtol=1e-4)
        assert [chunk.ids for chunk in score.chunks] == chunks
        recalls.update(chunks)
    assert len(recalls) > 1 or runtime is None, "nothing that changes was recalled"


@pytest.mark.parametrize(
    "memory",
    [
        {"sink": "one two three lamps"},
        {"attention_temperature": 0.5},
        {"attention_weight": 5.0},
        {"sinks": "each"},
        {"positions": "sequential"},
    ],
    ids=lambda memory: next(iter(memory)),
)
def test_memories_are_read_alike_whatever_their_settings(
    memory: dict[str, Any], runtime_of: Callable[..., Runtime]
) -> None:
    """The engine and a session have buffers of their own; the engine pads its sink to a multiple of 8 tokens."""
    adapter = make_adapter(**memory)
    runtime = runtime_of(adapter)
    prompt, text = Prompt(random_text(adapter.tokenizer, 20, seed=1)), random_text(adapter.tokenizer, 12, seed=2)
    with runtime.stream(adapter.dtype) as stream:
        (score,) = adapter.score([prompt], [text], [stream])
    tokens = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected, _ = decoded(adapter, runtime, prompt, tokens)
    torch.testing.assert_close(torch.tensor(score.log_probs), torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_examining_is_generating_and_scoring(
    family: str, with_memory: bool, runtime_of: Callable[..., Runtime]
) -> None:
    adapter = make_adapter(family)
    runtime = runtime_of(adapter) if with_memory else None
    settings = GenerateConfig(max_new_tokens=CHUNK + 3)
    texts = [random_text(adapter.tokenizer, length, seed=50 + length) for length in LENGTHS]
    wanted = [None if number == 2 else text for number, text in enumerate(texts)]
    prompts = [Prompt(random_text(adapter.tokenizer, 2 * length + 2, seed=length)) for length in LENGTHS]

    def streams(closing: ExitStack, count: int = len(LENGTHS)) -> list[Stream] | None:
        return [closing.enter_context(runtime.stream(adapter.dtype)) for _ in range(count)] if runtime else None

    with ExitStack() as closing:
        together = adapter.examine(prompts, wanted, streams(closing), settings)
        answers = adapter.generate(prompts, streams(closing), settings)
        apart = Adapter.examine(adapter, prompts, wanted, streams(closing), settings)
    for (answer, score), expected, (other, other_score) in zip(together, answers, apart, strict=True):
        assert answer.tokens == expected.tokens == other.tokens
        assert [chunk.ids for chunk in answer.chunks] == [chunk.ids for chunk in expected.chunks]
        if other_score is None:
            assert score is None
        else:
            assert score is not None
            torch.testing.assert_close(
                torch.tensor(score.log_probs), torch.tensor(other_score.log_probs), atol=1e-4, rtol=1e-4
            )
            assert [chunk.ids for chunk in score.chunks] == [chunk.ids for chunk in other_score.chunks]
    assert sum(score is None for _, score in together) == 1
    assert adapter.examine([], [], None, settings) == []


def test_without_memories_a_score_is_the_stock_models() -> None:
    adapter = make_adapter("llama")
    prompt, text = random_text(adapter.tokenizer, 9, seed=1), random_text(adapter.tokenizer, 11, seed=2)
    ids = adapter.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = adapter.tokenizer.bos_token_id
    logits = oracle(make_model("llama"), [bos], [], [*ids, *tokens], offset=1)[len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    (score,) = adapter.score([Prompt(prompt)], [text], None)
    torch.testing.assert_close(torch.tensor(score.log_probs), expected, atol=1e-4, rtol=1e-4)


def test_texts_that_cannot_be_scored_are_refused() -> None:
    adapter = make_adapter("llama")
    assert adapter.score([], [], None) == []
    with pytest.raises(InputError, match="a continuation needs at least one token"):
        adapter.score([Prompt("a bell")], [""], None)
    with pytest.raises(InputError, match="1 prompts, but 2 continuations"):
        adapter.score([Prompt("a bell")], ["a", "b"], None)


def test_an_adapter_with_other_memory_settings_shares_the_model() -> None:
    adapter = make_adapter("llama")
    other = adapter.with_memory(MemoryConfig(layers=(0, 1), reference_tokens=adapter.spec.reference_tokens))
    assert other.model is adapter.model
    assert other.spec.layers == (0, 1)
    assert other.model_fingerprint == adapter.model_fingerprint
