"""The constants that vLLM needs of a model, fitted to a few texts of Python's own documentation."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import transformers.models.llama.modeling_llama as llama

from m3model.adapter import TransformersAdapter
from m3model.vllm.constants import Constants

_TOPICS = ("assert", "class", "comparisons", "exceptions", "function", "raise")
_LENGTH, _PIECE = 1000, 250


@torch.inference_mode()
def write_constants(adapter: TransformersAdapter, bank: Path) -> None:
    layout = adapter.layout
    dim, seen, apply = layout.head_dim, [], llama.apply_rotary_pos_emb
    first = torch.zeros(layout.layers, layout.kv_heads, dim, dtype=torch.float64)
    second = torch.zeros(layout.layers, layout.kv_heads, dim, dim, dtype=torch.float64)

    def watched(*arguments, **named):
        found = apply(*arguments, **named)
        seen.append(found[0])
        return found

    ids = adapter.ids("\n".join(topics[name] for name in _TOPICS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "apply_rotary_pos_emb", watched)
        for start in range(0, 4 * _LENGTH, _LENGTH):
            session = adapter.session(1, context=_LENGTH)
            for at in range(start, start + _LENGTH, _PIECE):
                seen.clear()
                session.feed(torch.tensor([ids[at : at + _PIECE]]))
                queries = torch.cat(seen).double() * dim**-0.5  # [layers, heads, tokens, dim]
                grouped = queries.reshape(layout.layers, layout.kv_heads, -1, dim)
                first += grouped.sum(2)
                second += grouped.transpose(2, 3) @ grouped
    count = 4 * _LENGTH * queries.shape[1] // layout.kv_heads
    mean, second = first / count, second / count
    ridge = 1e-3 * second.diagonal(dim1=2, dim2=3).mean(-1)
    direction = torch.linalg.solve(second + ridge[..., None, None] * torch.eye(dim, dtype=torch.float64), mean)
    direction = direction / (mean * direction).sum(-1, keepdim=True)
    Constants(direction.float(), adapter._sink, tuple(adapter.sink_ids), adapter.model_fingerprint, adapter.spec).write(
        bank
    )
