"""Helpers of every codec: the token-major payload, the vectors of one memory, and the checks at both ends.

::

    payload: [fixed part] [token 0] [token 1] ...
    token:   [codes of all its key vectors] [codes of all its value vectors]

So the payload of a short memory is the beginning of a full one's layout. `m3runtime.codecs.kept` leaves out the bytes
of what heads do not keep.
"""

import torch
from torch import Tensor

from m3runtime.codecs.base import Codec
from m3runtime.device.copies import to_host
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors, budgets_of


def split(payloads: Tensor, width: int, fixed: int, key_bytes: int, value_bytes: int) -> tuple[Tensor, Tensor]:
    """The codes of the first ``width`` tokens: views ``uint8[n, width, key_bytes | value_bytes]``.

    ``key_bytes`` and ``value_bytes`` are those of one token, all layers and heads together.
    """
    token = key_bytes + value_bytes
    codes = torch.unflatten(payloads[:, fixed : fixed + width * token], 1, (width, token))
    return codes[:, :, :key_bytes], codes[:, :, key_bytes:]


def cycled(spec: MemorySpec, width: int) -> Tensor:
    """For each of the first ``width`` tokens, a token that each head keeps, ``int64[layers, kv_heads, width]``.

    What a head does not keep is filled with what it keeps, over and over: so neither ranges nor means depend on it.
    """
    return torch.arange(width) % budgets_of(spec)[..., None]


def _own(memories: MemoryTensors, i: int, spec: MemorySpec) -> list[Tensor]:
    """Keys and values of memory ``i``, its own tokens only; what heads do not keep is filled: see `cycled`."""
    own = int(memories.tokens[i])
    pair = [x[i, :, :, :own] for x in (memories.keys, memories.values)]
    if spec.budgets:
        places = cycled(spec, own)[..., None].expand(-1, -1, -1, spec.head_dim).to(memories.keys.device)
        pair = [x.gather(2, places) for x in pair]
    return pair


def check_finite(memories: MemoryTensors, i: int, spec: MemorySpec) -> None:
    """Raise `CodecError` unless all values of memory ``i`` are finite."""
    _check_finite(_own(memories, i, spec), i)


def _check_finite(pair: list[Tensor], i: int) -> None:
    if not all(map(finite, pair)):
        raise CodecError(f"memory {i} of the batch has values that are not finite")


def vectors(memories: MemoryTensors, i: int, spec: MemorySpec) -> tuple[Tensor, Tensor]:
    """Keys and values of memory ``i``, its own tokens only: ``float32[layers * kv_heads, tokens, head_dim]``.

    They are fresh and contiguous: what is computed from them cannot depend on the rest of the batch. What heads do not
    keep is filled: see `cycled`. Raises `CodecError` if one is not finite.
    """
    own = _own(memories, i, spec)
    _check_finite(own, i)
    pair = []
    for x in own:
        x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        pair.append(x.view(spec.vectors_per_token, -1, spec.head_dim))
    return pair[0], pair[1]


def existing(pair: tuple[Tensor, Tensor], spec: MemorySpec) -> tuple[Tensor, Tensor]:
    """Those of `vectors` that a token has: see `MemorySpec.heads`."""
    if not spec.heads:
        return pair
    keys, values = (x[places] for x, places in zip(pair, spec.places, strict=True))
    return keys, values


def filled_up(keys: Tensor, values: Tensor, spec: MemorySpec) -> tuple[Tensor, Tensor]:
    """Undo `existing` for a batch, ``[n, vectors, tokens, head_dim]``, with zeros for what no token has."""
    if not spec.heads:
        return keys, values
    pair = []
    for x, places in zip((keys, values), spec.places, strict=True):
        whole = x.new_zeros(len(x), spec.vectors_per_token, *x.shape[2:])
        whole[:, places] = x
        pair.append(whole)
    return pair[0], pair[1]


def on_cpu(memories: MemoryTensors) -> MemoryTensors:
    """Memories on the CPU, copied at once: each copy of a part, and each look at a number, waits for the device."""
    if memories.keys.device.type == "cpu":
        return memories
    return MemoryTensors(to_host(memories.keys), to_host(memories.values), memories.tokens)


def all_vectors(memories: MemoryTensors, spec: MemorySpec) -> tuple[Tensor, Tensor]:
    """Keys and values of all memories, own tokens only: ``float32[layers * kv_heads, all tokens, head_dim]``.

    They are fresh and contiguous, and lie on the memories' device, which is waited for once. What heads do not keep is
    filled: see `cycled`. Raises `CodecError` if a value is not finite.
    """
    pair, faults = [], []
    exists = memories.exists()
    places = exists.flatten().nonzero()[:, 0]  # of `exists`, which lies on the CPU
    places = places.to(memories.keys.device, non_blocking=True)
    filling = None
    if spec.budgets:
        filling = cycled(spec, memories.keys.shape[3])[None, ..., None].to(memories.keys.device, non_blocking=True)
    for x in (memories.keys, memories.values):
        x = x if filling is None else x.gather(3, filling.expand(len(x), -1, -1, -1, spec.head_dim))
        x = x.permute(1, 2, 0, 3, 4).reshape(spec.vectors_per_token, -1, spec.head_dim)
        own = x.index_select(1, places).to(torch.float32)
        faults.append(~own.isfinite().all(2).all(0))
        pair.append(own)
    fault = torch.stack(faults).any(0).cpu()
    if fault.any():
        of = torch.repeat_interleave(torch.arange(len(memories)), memories.tokens)
        raise CodecError(f"memory {int(of[fault][0])} of the batch has values that are not finite")
    return pair[0], pair[1]


def finite(x: Tensor) -> bool:
    """True if all values are finite, and for no values. One pass, where ``isfinite().all()`` takes several."""
    return not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def width_of(payloads: Tensor, tokens: Tensor, codec: Codec) -> int:
    """The most tokens of a batch of payloads, 0 for none. Raises `BlockError` if a count or the length cannot be."""
    if payloads.dtype != torch.uint8 or payloads.ndim != 2 or tokens.shape != payloads.shape[:1]:
        raise BlockError(f"payloads must be uint8[n, bytes] and tokens [n], not {tuple(payloads.shape)}")
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (1, 0)
    if low < 1 or high > codec.spec.tokens:
        raise BlockError(f"a memory has between 1 and {codec.spec.tokens} tokens, not {low if low < 1 else high}")
    if payloads.shape[1] < (needed := codec.payload_bytes(high)):
        raise BlockError(f"payloads of {payloads.shape[1]} bytes are too short, {needed} are needed")
    return high


def blank(x: Tensor, tokens: Tensor) -> Tensor:
    """Set what lies beyond each memory's own tokens to zero, in place; ``x`` is ``[n, ..., tokens, any]``."""
    for row, own in zip(x, tokens.tolist(), strict=True):
        if own < x.shape[-2]:
            row[..., own:, :] = 0
    return x


def finish(
    keys: Tensor, values: Tensor, tokens: Tensor, spec: MemorySpec, dtype: torch.dtype, peak: float
) -> MemoryTensors:
    """Memories of ``dtype`` out of contiguous ``[n, layers * kv_heads, tokens, head_dim]``.

    What is given is overwritten. ``peak`` bounds every value. Where ``dtype`` cannot hold it, values are clamped: no
    codec hands out infinity.
    """
    most = torch.finfo(dtype).max

    def shaped(x: Tensor) -> Tensor:
        if peak > most:
            x = x.to(torch.float32).clamp_(-most, most)
        return torch.unflatten(blank(x, tokens).to(dtype), 1, (len(spec.layers), spec.kv_heads))

    return MemoryTensors(shaped(keys), shaped(values), tokens)
