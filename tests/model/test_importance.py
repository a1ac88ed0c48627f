"""What errors in memories cost: the Fisher information is the curvature of what the model predicts."""

import pytest
import torch
from torch import Tensor

from m3model.adapter import TransformersAdapter
from m3model.engine.scoring import padded
from m3runtime.errors import InputError
from m3runtime.memory.tensors import MemoryTensors, kept
from tests.model.families import REFERENCE_TOKENS, make_adapter, make_uneven, random_text

STEP = 0.02


def texts(adapter: TransformersAdapter, count: int) -> list[str]:
    return [random_text(adapter.tokenizer, 6 + 3 * (seed % 5), seed) for seed in range(count)]


def predicted(adapter: TransformersAdapter, references: list[str], memories: MemoryTensors) -> list[Tensor]:
    """Log-probabilities after each token of the references, each read again beside its memory."""
    ids = [adapter.ids(f"\n{text}") for text in references]
    session = adapter.session(len(ids), context=64)
    rows = enumerate(memories.tokens.tolist())
    session.read([[(memories.keys[row, :, :, :own], memories.values[row, :, :, :own])] for row, own in rows])
    logits = session.all_logits(padded(ids), [len(row) for row in ids])
    return [row[: len(tokens)].double().log_softmax(-1) for row, tokens in zip(logits, ids, strict=True)]


def flat(memories: MemoryTensors) -> Tensor:
    """``[n, layers, tokens, 2 * kv_heads * head_dim]``."""
    return torch.cat([memories.keys, memories.values], 2).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "llama budgets"])
def test_it_predicts_how_far_predictions_move(family: str) -> None:
    """A small error moves them by a divergence of half of what it costs, to second order."""
    adapter = make_uneven(family)
    references = texts(adapter, 24)
    fisher = adapter.importance(references)
    memories = adapter.encode(references)
    before = predicted(adapter, references, memories)
    random = torch.Generator().manual_seed(1)
    exists = (memories.exists()[:, None, None] & kept(adapter.spec, memories.keys.shape[3]))[..., None]
    moved = expected = 0.0
    for _ in range(12):
        keys, values = (torch.randn(memories.keys.shape, generator=random) * STEP * exists for _ in range(2))
        after = predicted(
            adapter, references, MemoryTensors(memories.keys + keys, memories.values + values, memories.tokens)
        )
        moved += sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
        error = flat(MemoryTensors(keys, values, memories.tokens))
        expected += float(torch.einsum("nlti,lij,nltj->", error, fisher, error)) / 2
    assert moved > 0
    assert expected == pytest.approx(moved, rel=0.35)


def test_it_is_a_matrix_for_each_memory_layer() -> None:
    adapter = make_adapter()
    fisher = adapter.importance(texts(adapter, 6))
    spec = adapter.spec
    n = 2 * spec.kv_heads * spec.head_dim
    assert fisher.shape == (len(spec.layers), n, n)
    assert fisher.dtype == torch.float32
    torch.testing.assert_close(fisher, fisher.transpose(1, 2))
    assert (torch.linalg.eigvalsh(fisher.double()) > -1e-6 * float(fisher.abs().max())).all()
    assert torch.equal(fisher, adapter.importance(texts(adapter, 6)))
    assert not any(parameter.grad is not None for parameter in adapter.model.parameters())


def test_only_memory_layers_count() -> None:
    some = make_adapter(layers=(1, 2))
    assert some.importance(texts(some, 4)).shape[0] == 2


def test_references_that_cannot_be_encoded_are_refused() -> None:
    adapter = make_adapter()
    with pytest.raises(InputError, match=f"at most {REFERENCE_TOKENS} tokens"):
        adapter.importance([random_text(adapter.tokenizer, REFERENCE_TOKENS + 5, 0)])
