"""Shares of attention: those of the engine are those that a session's attention gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

import m3model.attention.implementation as implementation
from m3model.attention.cache import MemoryCache
from m3model.engine.step import telling
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.adapters.evidence import evidence
from m3runtime.adapters.grounding import Grounding, Span
from m3runtime.config.schema import GenerateConfig
from tests.model.banks import make_runtime
from tests.model.families import make_adapter, make_uneven, random_text
from tests.model.given import GivenMemories

FAMILIES = ("llama", "mistral-sliding", "gemma2", "gpt_oss-sliding", "gemma4_text", "llama budgets", "gemma2 budgets")


def expected(adapter: TransformersAdapter, given: GivenMemories, prompt: Prompt, answer: Answer) -> list[list[float]]:
    """The share of each memory at each token of the answer, by one session that reads all tokens at once."""
    session = adapter.session(batch=1)
    session.read([given.parts], ids=[[1, 2, 3]])
    tokens = [*adapter.ids(prompt.text), *answer.tokens[:-1]]
    weights: list[torch.Tensor] = []
    attend = MemoryCache.attend

    def looked_at(cache: MemoryCache, query: Any, keys: Any, values: Any, window: Any, weighing: Any) -> Any:
        mask = cache.mask(keys.shape[2], window)
        if keys.shape[2] - len(tokens) > cache.sink_tokens:  # a layer with memories
            weights.append(implementation.attention_weights(query, keys, mask, weighing)[0].mean(0))
        return attend(cache, query, keys, values, window, weighing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryCache, "attend", looked_at)
        session.all_logits(torch.tensor([tokens]))
    used = session.cache.used
    told = telling(len(weights))
    chosen = [one for place, one in enumerate(weights) if place in told]
    mean = torch.stack(chosen).mean(0)[-len(answer.tokens) :, :used]  # [tokens, columns]
    slots = [slot for _, slot in sorted(session.cache._slots[0].items())]  # type: ignore[type-var]
    return [[float(token[used - slot.end : used - slot.start].sum()) for slot in slots] for token in mean]


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_attention(family: str) -> None:
    adapter = make_uneven(family)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (21, 9, 14)]
    given = GivenMemories(adapter, texts, chunk_tokens=64)
    prompts = [Prompt(random_text(adapter.tokenizer, length, seed=length)) for length in (11, 4)]
    settings = GenerateConfig(max_new_tokens=10, grounding=True)
    answers = adapter.generate(prompts, [given.stream(), given.stream()], settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.grounding is not None
        assert [list(one) for one in answer.grounding.shares] == [[1, 2, 3]] * len(answer.tokens)
        found = torch.tensor([list(one.values()) for one in answer.grounding.shares])
        torch.testing.assert_close(found, torch.tensor(expected(adapter, given, prompt, answer)), atol=1e-5, rtol=1e-4)
        assert 0 < answer.grounding.share < 1


def test_a_token_is_read_from_the_memories_of_its_own_chunk(tmp_path: Path) -> None:
    """Also beside a row that asks for nothing, and one without memories."""
    adapter = make_adapter()
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
    with make_runtime(adapter, tmp_path / "bank", texts) as runtime:
        prompt = Prompt(random_text(adapter.tokenizer, 13, seed=1))
        asks = GenerateConfig(max_new_tokens=20, grounding=True, grounding_floor=1)
        silent = GenerateConfig(max_new_tokens=20, grounding_floor=1)
        with runtime.stream(adapter.dtype) as stream, runtime.stream(adapter.dtype) as other:
            (alone,) = adapter.generate([prompt], [stream], asks)
            (quiet,) = adapter.generate([prompt], [other], silent)
            (bare,) = adapter.generate([prompt], None, asks)
    assert (quiet.grounding, quiet.evidence, quiet.grounded) == (None, None, None)
    assert quiet.tokens == alone.tokens
    assert bare.grounding is not None
    assert bare.grounding.shares == ({},) * 20
    assert bare.grounding.share == 0.0
    assert (bare.evidence, bare.grounded) == (None, None)  # it was not to read any memory
    assert alone.grounding is not None
    assert alone.grounding.leader is not None
    leading = texts[alone.grounding.leader - 1]
    assert alone.evidence == evidence(prompt.text, alone.text, alone.grounding, leading)
    assert alone.grounded is False
    read = [set(chunk.ids) for chunk in alone.chunks]
    told = [set(one) for one in alone.grounding.shares]
    assert len({frozenset(one) for one in told}) > 1  # or memories never changed
    assert all(one in read for one in told)
    assert told[0] == read[1]  # two chunks of prompt
    assert alone.grounding.ends[-1] == len(alone.text)
    assert set(alone.grounding.memories) == set.union(*told)


def test_the_layers_that_tell_are_of_the_third_quarter() -> None:
    assert telling(30) == {15, 16, 18, 20}
    assert telling(1) == {0}
    for layers in range(1, 200):
        assert all(layers // 2 <= place < max(1, layers * 3 // 4 + 1, layers // 2 + 1) for place in telling(layers))


LAMP = "The harbour\nThe lamp of Brindolvar burns walnut oil. It was lit in 1431."


@pytest.mark.parametrize(
    ("question", "answer", "share"),
    [
        ("What does the lamp of Brindolvar burn?", " Walnut oil.", 1),
        ("What does the lamp of Brindolvar burn?", " It burns petrol.", 3 / 4),  # burns, and not petrol
        ("What does the lamp of Brindolvar burn?", " Gas.", 1 / 2),  # a short word, where there is no other
        ("Does the lamp burn walnut oil or petrol?", " Walnut oil", 1),  # no words of its own: all count
        ("What does the lamp of Upper Brindolvar burn?", " Walnut oil.", 1 / 2),
        ("What does the lamp of Tarn burn?", " Walnut oil.", 0),
        ("The lamp. What does it burn? And the Harbour?", " Walnut oil.", 1),  # the heading counts
        ("Was it lit in 1432?", " Walnut oil.", 0),
        ("\u706f\u662f\u4ec0\u4e48?", " \u6cb9", 1 / 2),
        ("What does it burn?", "", 1 / 2),
    ],
)
def test_evidence(question: str, answer: str, share: float) -> None:
    grounding = Grounding((1,), ({1: 0.3, 2: 0.1},))
    assert evidence(question, answer, grounding, LAMP) == pytest.approx(0.75 * share)
    assert evidence(question, answer, Grounding((), ()), None) == 0


def test_spans() -> None:
    shares: tuple[dict[int, float], ...] = ({1: 0.5, 2: 0.1}, {1: 0.3, 2: 0.2}, {2: 0.4}, {}, {2: 0.05}, {2: 0.6})
    grounding = Grounding((3, 5, 9, 12, 14, 14), shares)
    assert grounding.spans(0.0) == (
        Span(0, 5, 1, 0.4), Span(5, 9, 2, 0.4), Span(12, 14, 2, 0.325),
    )  # fmt: skip
    assert [span.id for span in grounding.spans(0.35)] == [1, 2]
    assert grounding.share == pytest.approx((0.6 + 0.5 + 0.4 + 0.05 + 0.6) / 6)
    assert grounding.memories == pytest.approx({1: 0.8 / 6, 2: (0.1 + 0.2 + 0.4 + 0.05 + 0.6) / 6})
    assert grounding.leader == 2
    assert grounding.lead == pytest.approx(1.35 / 2.15)
    assert Grounding((), ()).share == Grounding((), ()).lead == 0.0
    assert Grounding((), ()).leader is None
    assert Grounding((), ()).spans(0.0) == ()
