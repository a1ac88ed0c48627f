"""Computing memories: one forward pass over a batch of references, each after the sink (Memory³, section 3.3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from m3model.attention.selection import observed
from m3model.attention.stopping import stopping_after
from m3model.engine.session import Session, Sink
from m3runtime.errors import InputError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors


def reference_ids(texts: Sequence[str], ids: Sequence[list[int]], most: int) -> Sequence[list[int]]:
    """``ids`` as they are. Raises `InputError` if a text is blank or has more than ``most`` tokens."""
    if not texts:
        raise InputError("there is no reference to encode")
    for text, tokens in zip(texts, ids, strict=True):
        if not text.strip() or not tokens:
            raise InputError("a blank text is no reference")
        if len(tokens) > most:
            raise InputError(f"a reference has at most {most} tokens, not {len(tokens)}: {text[:40]!r}...")
    return ids


@torch.inference_mode()
def encode_dense(model: Any, ids: Sequence[list[int]], sink: Sink, spec: MemorySpec) -> MemoryTensors:
    """Memories of all tokens: causal, after the sink, at positions from the sink's end on."""
    counts = [len(tokens) for tokens in ids]
    width = max(counts)
    # No room for the context before the sink is in, or it would be made twice.
    session = Session(model, batch=len(ids), sink=sink, offset=sink[0].shape[2], context=0)
    with stopping_after(session.cache, session.layout.last(spec.layers)):
        session.feed(torch.tensor([row + [0] * (width - len(row)) for row in ids]), counts)
    parts = [session.layout.packed(session.cache.context(layer)) for layer in spec.layers]
    return MemoryTensors(
        keys=torch.stack([keys for keys, _ in parts], dim=1),
        values=torch.stack([values for _, values in parts], dim=1),
        tokens=torch.tensor(counts),
    )


def encode_scored(model: Any, ids: Sequence[list[int]], sink: Sink, spec: MemorySpec) -> tuple[MemoryTensors, Tensor]:
    """Memories of all tokens, and the scores by which `m3model.attention.selection.select` chooses among them.

    The scores are ``float32[n, layers, kv_heads, T]`` on the model's device, zero beyond a memory's tokens and a
    layer's heads: several counts of tokens can be tried after one encoding. Raises `ConfigError` as `observed` does.
    """
    with observed(model, spec.layers) as scores:
        memories = encode_dense(model, ids, sink, spec)
    device = memories.keys.device
    most = max(scores[layer].shape[1] for layer in spec.layers)
    by_layer = [pad(scores[layer].to(device), (0, 0, 0, most - scores[layer].shape[1])) for layer in spec.layers]
    return memories, torch.stack(by_layer, dim=1)


@torch.inference_mode()
def encode_repeated(model: Any, ids: Sequence[list[int]], sink: Sink, spec: MemorySpec) -> tuple[MemoryTensors, Tensor]:
    """`encode_scored` with other scores: the attention that a model which repeats the text gives to its tokens.

    The model reads each reference a second time, with the memory of all its tokens. That takes twice the time, and
    needs nothing of how the model's layers are built, but that they are alike and each has keys of its own.
    """
    memories = encode_dense(model, ids, sink, spec)
    counts = [len(row) for row in ids]
    width = max(counts)
    offset = sink[0].shape[2] + spec.reference_tokens
    session = Session(model, batch=len(ids), memory_layers=spec.layers, sink=sink, offset=offset, context=width)
    pairs = zip(memories.keys, memories.values, counts, strict=True)
    session.read([[(keys[:, :, :count], values[:, :, :count])] for keys, values, count in pairs])
    with session.cache.receiving() as received:
        session.feed(torch.tensor([row + [0] * (width - len(row)) for row in ids]), counts)
    scores = torch.stack(received, dim=1)  # [n, layers, kv_heads, T]; a memory is at the right end of its row
    for row, count in enumerate(counts):
        scores[row] = scores[row].roll(count - width, -1)
    return memories, scores
