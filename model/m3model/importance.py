"""What errors in memories cost: how much the model's predictions change with each channel of keys and values.

To second order, an error ``e`` in the keys and values of one token changes what the model predicts by a KL divergence
of ``e @ F @ e / 2`` with the Fisher information ``F = E[g g^T]``, ``g`` the gradient of the log-likelihood of tokens
drawn from the model's own predictions (Amari 1998). Here the model reads the text of each reference again beside its
memory, so nothing but references is needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3model.reading import padded

if TYPE_CHECKING:
    from m3model.adapter import TransformersAdapter

_BATCH = 8
_SEED = 0


def importance(adapter: "TransformersAdapter", references: Sequence[str]) -> Tensor:
    """The mean Fisher information of a token's keys and values, ``float32[memory layers, n, n]`` on the CPU.

    ``n`` is ``2 * kv_heads * head_dim``: keys of all heads, then values. Deterministic on one device. Raises
    `InputError` as `Adapter.encode` does.
    """
    spec, device = adapter.spec, adapter.device
    n = 2 * spec.kv_heads * spec.head_dim
    total = torch.zeros(len(spec.layers), n, n, device=device)
    tokens = 0
    draw = torch.Generator().manual_seed(_SEED)
    # Batches of references of like length waste little on padding.
    order = sorted(references, key=adapter.count_tokens)
    for start in range(0, len(order), _BATCH):
        texts = order[start : start + _BATCH]
        for gradient in _gradients(adapter, texts, draw):
            total += gradient.transpose(1, 2) @ gradient
            tokens += gradient.shape[1]
    return (total / max(1, tokens)).cpu()


def _gradients(adapter: "TransformersAdapter", texts: Sequence[str], draw: torch.Generator) -> list[Tensor]:
    """Of each memory, the gradient of its keys and values: ``float32[memory layers, tokens, n]``."""
    encoded = adapter.encode(texts)
    ids = [adapter.ids(f"\n{text}") for text in texts]
    leaves = []
    for row, count in enumerate(encoded.tokens.tolist()):
        pair = (encoded.keys[row, :, :, :count], encoded.values[row, :, :, :count])
        leaves.append(tuple(x.clone().requires_grad_() for x in pair))  # a clone of what inference mode made is plain
    counts = [len(row) for row in ids]
    session = adapter.session(len(texts), context=max(counts))
    with torch.enable_grad():
        session.read_with_gradients([[(keys, values)] for keys, values in leaves])
        logits = session.logits_with_gradients(padded(ids), counts)
        likelihood = _drawn(logits.float().log_softmax(-1), counts, draw)
        flat = torch.autograd.grad(likelihood, [leaf for pair in leaves for leaf in pair])
    return [
        torch.cat([flat[2 * row], flat[2 * row + 1]], 1).float().transpose(1, 2).flatten(2) for row in range(len(texts))
    ]


def _drawn(log_probs: Tensor, counts: Sequence[int], draw: torch.Generator) -> Tensor:
    """The log-likelihood, in all rows and after each of their tokens, of a token drawn from what is predicted."""
    found = []
    for row, count in zip(log_probs, counts, strict=True):
        # Drawn on the CPU: generators of devices differ.
        token = torch.multinomial(row[:count].detach().exp().cpu(), 1, generator=draw).to(row.device)
        found.append(row[:count].gather(1, token).sum())
    return torch.stack(found).sum()
