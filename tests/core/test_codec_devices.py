"""Encoding on an accelerator, seen without one: on the meta device tensors have no numbers that a host could read."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.residual_quantiser import ResidualQuantiser, Tables
from m3runtime.testing.codec import SPEC, make_memories

ELSEWHERE = torch.device("meta")


def moved(tables: Tables) -> Tables:
    tensors = {name: tensor.to(ELSEWHERE) for name, tensor in tables.tensors("x").items()}
    return Tables.of("x", tables.levels, tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"keys": "2x9+4x10", "values": "4x8", "rotation": "opq", "scope": "model", "offset": False},
        {"keys": "4x8", "values": "2x8", "rotation": "pca", "scope": "head"},
    ],
)
def test_levels_are_encoded_and_decoded_where_the_memory_lies(options: dict[str, Any]) -> None:
    """The paper's quantiser has such levels; its codes were asked of faiss once, by tables that lie on the host."""
    codec = ProductCodec(SPEC, **options)
    codec.fit(make_memories([12] * 24))
    quantiser = codec.quantiser
    assert isinstance(quantiser, ResidualQuantiser)
    offset = None if quantiser.offset is None else quantiser.offset.to(ELSEWHERE)
    there = replace(quantiser, keys=moved(quantiser.keys), values=moved(quantiser.values), offset=offset)
    keys, values = torch.empty(2, SPEC.vectors_per_token, 12, 16, device=ELSEWHERE)
    payloads = torch.empty(1, codec.payload_bytes(12), dtype=torch.uint8, device=ELSEWHERE)
    there.encode((keys, values), payloads[0])
    assert [x.device for x in there.decode(payloads, 12)] == [ELSEWHERE, ELSEWHERE]
