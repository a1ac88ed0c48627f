"""`decode_speed`: decoding speed of codecs, against faiss on the same codes and threads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import faiss
import torch
from torch import Tensor

from m3runtime.codecs import Codec
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.faiss_exchange import index_of, to_faiss
from m3runtime.codecs.product.residual_quantiser import ResidualQuantiser
from m3runtime.lab.bench.timing import alternate
from m3runtime.lab.results import Spread
from m3runtime.memory.tensors import MemoryTensors

COPY = "copy of the result"
BUFFER = 256 << 20
"""Bytes of the larger copy, which exceed any cache."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The times to decode the same memories."""

    memories: int
    tokens: int
    bytes: int
    """Bytes of the decoded memories in float32."""
    times: Mapping[str, Spread]

    def limit(self, name: str) -> float:
        """Seconds to copy as many bytes as a contender writes."""
        return self.times[f"{COPY}, 16 bits" if "float16" in name else COPY].median


def decode_speed(
    quarter: Mapping[str, ProductCodec],
    others: Mapping[str, Codec],
    memories: MemoryTensors,
    device: torch.device,
    rounds: int,
    threads: int,
    progress: Callable[[int], None],
) -> Speed:
    """Time decoding of full memories (`filled`) with all layers and heads, keys and values, in one call.

    ``quarter`` has trained codecs of a quarter of a byte per channel, without rotation and offset, by scope (``model``,
    ``head``). ``others`` are decoded to float32. faiss decodes on the CPU.
    """
    tokens = memories.tokens
    contenders: dict[str, Callable[[], object]] = {}

    def ours(codec: Codec, payloads: Tensor, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: codec.decode(payloads, tokens, dtype)

    for scope, codec in quarter.items():
        payloads = codec.encode(memories)
        on_device = payloads.to(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            contenders[f"product, scope {scope}, {name}"] = ours(codec, on_device, dtype)
        contenders[f"faiss sa_decode, scope {scope}"] = _by_faiss(codec, payloads, threads)
    for name, other in others.items():
        contenders[name] = ours(other, other.encode(memories).to(device), torch.float32)
        contenders[f"{name}, encoding"] = lambda codec=other: codec.encode(memories)  # type: ignore[misc]
    written = 2 * memories.keys.numel() * 4
    for name, size in ((COPY, written), (f"{COPY}, 16 bits", written // 2), ("copy of 256 MiB", BUFFER)):
        source, target = (torch.ones(size // 4, device=device) for _ in range(2))
        contenders[name] = lambda source=source, target=target: target.copy_(source)  # type: ignore[misc]
    times = alternate(contenders, rounds, progress)
    return Speed(len(memories), int(tokens.sum()), written, times)


def filled(memories: MemoryTensors, tokens: int) -> MemoryTensors:
    """Memories of ``tokens`` tokens each, their own repeated, so that all contenders decode equally much."""
    again = [torch.arange(tokens) % own for own in memories.tokens.tolist()]
    keys, values = (
        torch.stack([x[i, :, :, which] for i, which in enumerate(again)]) for x in (memories.keys, memories.values)
    )
    return MemoryTensors(keys, values, torch.full_like(memories.tokens, tokens))


def _by_faiss(codec: ProductCodec, payloads: Tensor, threads: int) -> Callable[[], object]:
    work = same_codes(codec, payloads)

    def decode() -> None:
        faiss.omp_set_num_threads(threads)
        for index, codes in work:
            index.sa_decode(codes)

    return decode


def same_codes(codec: ProductCodec, payloads: Tensor) -> list[tuple[Any, Any]]:
    """Faiss indexes and the codes for them, ``uint8[vectors, bytes]``: all keys, then all values of the payloads.

    There is one index for the whole model, or one for each layer and head, by the codec's scope. The codec must have
    codes that faiss knows.
    """
    quantiser = codec.quantiser
    assert isinstance(quantiser, ResidualQuantiser)
    heads = codec.spec.vectors_per_token
    # [memories, tokens, keys and values, heads, bytes]
    codes = torch.unflatten(payloads, 1, (-1, 2, heads, quantiser.token_bytes // heads // 2))
    work: list[tuple[Any, Any]] = []
    for kind, name in enumerate(("keys", "values")):
        own = codes[:, :, kind]
        if quantiser.exchangeable:
            work.append((to_faiss(codec, name), own.flatten(0, 2).contiguous().numpy()))
            continue
        tables = quantiser.keys if kind == 0 else quantiser.values
        for head in range(heads):
            alone = replace(tables, centroids=tuple(table[head : head + 1] for table in tables.centroids))
            work.append((index_of(alone), own[:, :, head].flatten(0, 1).contiguous().numpy()))
    return work
