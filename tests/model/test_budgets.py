"""Heads that keep more tokens than others: a memory is read as if each head saw those of its own and no others."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import ConfigError
from tests.model.families import BUDGETS, LAYERS, REFERENCE_TOKENS, make_adapter, make_model, oracle, random_text
from tests.model.given import GivenMemories
from tests.model.test_parity import TOLERANCE, context_of, ids_of, parts, token_by_token, whole

LENGTHS = (REFERENCE_TOKENS, 9, 2)
ALIKE = ["llama", "gemma2", "gemma3_text", "gpt_oss-sliding", "qwen2-sliding"]


def texts_of(adapter: TransformersAdapter) -> list[str]:
    return [random_text(adapter.tokenizer, length, seed=length) for length in LENGTHS]


def seen(adapter: TransformersAdapter, texts: Sequence[str]) -> list[Tensor]:
    """Which tokens of these references each KV head keeps, by layer: the best scored ones."""
    memories, scores = adapter.encode_scored(texts)
    kept = []
    for layer, budgets in enumerate(adapter.spec.budgets):
        rows = []
        for head, budget in enumerate(budgets):
            of_head = []
            for row, count in enumerate(memories.tokens.tolist()):
                order = sorted(range(count), key=lambda at, of=scores[row, layer, head]: (-float(of[at]), at))
                of_head += [at in order[:budget] for at in range(count)]
            rows.append(of_head)
        kept.append(torch.tensor(rows))
    return kept


def expected(adapter: TransformersAdapter, family: str, log_weights: Sequence[float] | None = None) -> Tensor:
    texts = texts_of(adapter)
    return oracle(
        make_model(family),
        adapter.sink_ids,
        [ids_of(adapter, text) for text in texts],
        context_of(adapter).tolist(),
        offset=adapter.offset,
        memory_layers=adapter.spec.layers,
        log_weights=log_weights,
        kept=seen(adapter, texts),
    )


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("way", [whole, token_by_token])
def test_each_head_reads_its_own_tokens(family: str, way: object) -> None:
    adapter = make_adapter(family, tokens_per_head=BUDGETS)
    weights = [0.0, -0.7, 0.3]
    session = adapter.session(1, context=4)
    session.read([parts(adapter, texts_of(adapter))], [weights])
    read = way(session, context_of(adapter))  # type: ignore[operator]
    assert float((read - expected(adapter, family, weights)).abs().max()) < TOLERANCE


budgets = st.lists(st.lists(st.integers(1, REFERENCE_TOKENS), min_size=2, max_size=2), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=25, deadline=None)
@given(budgets)
def test_any_budgets_are_kept_and_read(chosen: list[list[int]]) -> None:
    adapter = make_adapter("llama", tokens_per_head=chosen)
    most = max(map(max, chosen))
    assert adapter.spec.tokens == most
    if min(map(min, chosen)) == most:
        assert adapter.spec.budgets == ()
        return
    memories = adapter.encode(texts_of(adapter))
    assert memories.tokens.tolist() == [min(length, most) for length in LENGTHS]
    for layer, of_heads in enumerate(chosen):
        for head, budget in enumerate(of_heads):
            for x in (memories.keys, memories.values):
                assert not x[:, layer, head, budget:].any()
                assert x[0, layer, head, : min(budget, LENGTHS[0])].abs().amax(-1).gt(0).all()
    session = adapter.session(1)
    session.read([parts(adapter, texts_of(adapter))])
    read = whole(session, context_of(adapter))
    assert float((read - expected(adapter, "llama")).abs().max()) < TOLERANCE


def test_rows_and_memories_may_come_and_go() -> None:
    adapter = make_adapter("llama", tokens_per_head=BUDGETS)
    some = parts(adapter, texts_of(adapter))
    together = adapter.session(2, context=4)
    context = context_of(adapter)[None].expand(2, -1)
    found = []
    for rows in ([some[:1], some[1:]], [some[1:], some], [[], some[:2]]):  # the buffers grow, and slots change
        together.read(rows)
        found.append(together.all_logits(context[:, :7]))
    for row in range(2):
        alone = adapter.session(1, context=64)
        for step, rows in enumerate(([some[:1], some[1:]], [some[1:], some], [[], some[:2]])):
            alone.read([rows[row]])
            assert float((alone.all_logits(context[:1, :7])[0] - found[step][row]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss-sliding"])
def test_the_engine_reads_what_a_session_reads(family: str) -> None:
    adapter = make_adapter(family, tokens_per_head=BUDGETS)
    given = GivenMemories(adapter, texts_of(adapter), chunk_tokens=64)
    prompts = [Prompt(random_text(adapter.tokenizer, length, seed=length)) for length in (11, 40, 3)]
    written = adapter.generate(
        prompts, [given.stream() for _ in prompts], GenerateConfig(max_new_tokens=12, log_probs=0)
    )
    for prompt, answer in zip(prompts, written, strict=True):
        session = adapter.session(1)
        session.read([given.parts])
        tokens = [*adapter.ids(prompt.text), *answer.tokens]
        logits = session.all_logits(torch.tensor([tokens[:-1]]))[0, -len(answer.tokens) :].log_softmax(-1)
        wanted = logits[torch.arange(len(answer.tokens)), list(answer.tokens)]
        found = torch.tensor([one.log_prob for one in answer.log_probs])
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert logits.argmax(-1).tolist() == list(answer.tokens)


@pytest.mark.parametrize("sinks", ["once", "each"])
def test_what_a_head_does_not_have_is_not_read(sinks: str) -> None:
    adapter = make_adapter("llama", tokens_per_head=BUDGETS, sinks=sinks)
    [(keys, values)] = parts(adapter, texts_of(adapter)[:1])

    def read(keys: Tensor, values: Tensor) -> Tensor:
        session = adapter.session(1)
        session.read([[(keys, values)]])
        return whole(session, context_of(adapter))

    right, noise = read(keys, values), torch.randn(2, *keys.shape)
    for layer, of_heads in enumerate(BUDGETS):
        for head, budget in enumerate(of_heads):
            changed = [x.clone() for x in (keys, values)]
            for x, other in zip(changed, noise, strict=True):
                x[layer, head, budget:] = other[layer, head, budget:]
            assert torch.equal(read(*changed), right)
            changed[1][layer, head, budget - 1] += 1
            assert not torch.allclose(read(*changed), right, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma4_text", "mimo_v2_flash"])
def test_layers_that_are_not_alike_have_no_budgets(family: str) -> None:
    adapter = make_adapter(family)
    chosen = [[4] * (adapter.spec.kv_heads - 1) + [3]] * len(adapter.spec.layers)
    with pytest.raises(ConfigError, match=r"memory.tokens_per_head: heads can have budgets of their own where"):
        make_adapter(family, tokens_per_head=chosen)
