"""The cost of errors in memories: how much the model's predictions change with each channel of keys and values.

To second order, an error ``e`` in the keys and values of one token changes what the model predicts by a KL divergence
of ``e @ F @ e / 2`` with the Fisher information ``F = E[g g^T]``, ``g`` the gradient of the log-likelihood of tokens
drawn from the model's own predictions (Amari 1998). Here the model reads the text of each reference again with its
memory, so nothing but references is needed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m3model.engine.scoring import padded
from m3model.engine.session import Session
from m3runtime.errors import InputError
from m3runtime.memory.tensors import MemoryTensors

_BATCH = 2
"""References read together. Logits and activations of more take gigabytes, and save little time."""
_SEED = 0


def importance(
    references: Sequence[str],
    encode: Callable[[Sequence[str]], MemoryTensors],
    ids: Callable[[str], list[int]],
    session: Callable[..., Session],
    budgets: Tensor | None = None,
) -> Tensor:
    """The mean Fisher information of a token's keys and values, ``float32[memory layers, n, n]`` on the CPU.

    ``n`` is ``2 * kv_heads * head_dim``: keys of all heads, then values. ``encode``, ``ids`` and ``session`` are those
    of the adapter. With ``budgets``, ``int64[memory layers, kv_heads]``, the mean of a head is over the tokens that it
    keeps. Deterministic on one device. Raises `InputError` without references, or as ``encode`` does.
    """
    total: Tensor | None = None
    counts: list[int] = []
    draw = torch.Generator().manual_seed(_SEED)
    # Batches of references of like length waste little on padding.
    order = sorted(references, key=lambda text: len(ids(text)))
    for start in range(0, len(order), _BATCH):
        texts = order[start : start + _BATCH]
        for gradient in _gradients(texts, encode, ids, session, draw):
            outer = gradient.transpose(1, 2) @ gradient
            total = outer if total is None else total.add_(outer)
            counts.append(gradient.shape[1])
    if total is None:
        raise InputError("importance needs at least one reference")
    if budgets is None:
        return (total / sum(counts)).cpu()
    kept = torch.stack([budgets.clamp_max(count) for count in counts]).sum(0)
    # Of a channel; of two channels, the geometric mean.
    root = kept.repeat_interleave(total.shape[1] // (2 * kept.shape[1]), 1).repeat(1, 2).sqrt()
    return total.cpu() / (root[:, :, None] * root[:, None])


def _gradients(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], MemoryTensors],
    ids: Callable[[str], list[int]],
    new_session: Callable[..., Session],
    draw: torch.Generator,
) -> list[Tensor]:
    """The gradients of each memory's keys and values: ``float32[memory layers, tokens, n]``."""
    encoded = encode(texts)
    read = [ids(f"\n{text}") for text in texts]
    leaves = []
    for row, count in enumerate(encoded.tokens.tolist()):
        pair = (encoded.keys[row, :, :, :count], encoded.values[row, :, :, :count])
        leaves.append(tuple(x.clone().requires_grad_() for x in pair))  # a clone of what inference mode made is plain
    counts = [len(row) for row in read]
    session = new_session(len(texts), context=max(counts))
    with torch.enable_grad():
        session.read_with_gradients([[(keys, values)] for keys, values in leaves])
        logits = session.logits_with_gradients(padded(read), counts)
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
