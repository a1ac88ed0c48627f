"""Layers with fewer heads than others: what they do not have takes no bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.bank.manifest import SHAPED, Manifest
from m3runtime.codecs import Codec
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.errors import BankMismatchError, ConfigError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC, make_memories

FEWER = replace(SPEC, heads=((1, 2), (2, 2), (1, 1)))
"""Of three layers with two heads."""


def emptied(memories: MemoryTensors) -> MemoryTensors:
    """The same, with zeros for heads that `FEWER` does not have."""
    for layer, counts in enumerate(FEWER.heads):
        for x, count in zip((memories.keys, memories.values), counts, strict=True):
            x[:, layer, count:] = 0
    return memories


def manifest(spec: MemorySpec) -> Manifest:
    codec = RawCodec(spec)
    return Manifest(
        model="m" * 32,
        model_name="model",
        tokenizer="t" * 32,
        sink="Reference:",
        spec=spec,
        codec_kind=codec.kind,
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder="e" * 32,
        embedder_name="embedder",
        dim=8,
    )


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), min_size=3, max_size=3))
def test_a_spec_is_read_as_it_was_written(heads: list[tuple[int, int]]) -> None:
    spec = SPEC if all(pair == (2, 2) for pair in heads) else replace(SPEC, heads=tuple(heads))
    assert MemorySpec.from_json(spec.to_json()) == spec
    assert ("heads" in spec.to_json()) == (spec != SPEC)
    assert spec.numbers_per_token == sum(map(sum, heads)) * spec.head_dim


@pytest.mark.parametrize("heads", [((1, 1), (2, 2)), ((0, 1), (2, 2), (2, 2)), ((3, 2), (2, 2), (2, 2)), ((2, 2),) * 3])
def test_heads_that_do_not_fit_are_refused(heads: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="heads must be those of 3 layers that have at most 2"):
        replace(SPEC, heads=heads)
    stated = {**SPEC.to_json(), "heads": [list(pair) for pair in heads]}
    with pytest.raises(ConfigError, match="heads must be"):
        MemorySpec.from_json(stated)
    with pytest.raises(ConfigError, match="not a memory spec"):
        MemorySpec.from_json({**stated, "heads": [[1, True]]})


@pytest.mark.parametrize(
    "make",
    [
        RawCodec,
        lambda spec: RawCodec(spec, dtype="float16"),
        ScalarCodec,
        lambda spec: ScalarCodec(spec, key_bits=4, value_bits=8),
    ],
)
def test_what_no_layer_has_is_not_stored(make: type[RawCodec]) -> None:
    memories = emptied(make_memories([12, 5, 1]))
    whole, fewer = make(SPEC), make(FEWER)
    assert fewer.fingerprint != whole.fingerprint
    payloads = fewer.encode(memories)
    assert fewer.payload_bytes(12) == payloads.shape[1] < whole.payload_bytes(12)
    if isinstance(fewer, RawCodec):
        assert fewer.payload_bytes(12) * 12 == whole.payload_bytes(12) * 9
    wanted = whole.decode(whole.encode(memories), memories.tokens, torch.float32)
    found = fewer.decode(payloads, memories.tokens, torch.float32)
    assert torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.values, wanted.values)
    none = fewer.decode(payloads[:0], memories.tokens[:0], torch.float32)
    assert none.keys.shape == (0, 3, 2, 0, 16)


@pytest.mark.parametrize("together", ["layer", "head"])
def test_the_product_codec_spends_bytes_on_what_there_is(together: str) -> None:
    codecs: list[Codec] = [ProductCodec(spec, bytes=8, together=together) for spec in (SPEC, FEWER)]
    assert [codec.payload_bytes(1) for codec in codecs] == [8 * 6, 8 * 9 // 2]
    codec, sample = codecs[1], emptied(make_memories([12, 9] * 12, seed=1))
    codec.fit(sample)
    memories = emptied(make_memories([12, 5], seed=2))
    decoded = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
    assert codec.distortion(memories).keys < 0.1
    for x, counts in ((decoded.keys, [1, 2, 1]), (decoded.values, [2, 2, 1])):
        for layer, count in enumerate(counts):
            assert float(x[:, layer, count:].abs().amax() if count < 2 else 0) < 1e-6


def test_a_bank_of_such_a_spec_has_a_format_of_its_own() -> None:
    whole, fewer = manifest(SPEC), manifest(FEWER)
    assert fewer.format == SHAPED
    assert whole.format == 1
    for one in (whole, fewer):
        assert Manifest.from_bytes(one.to_bytes(), Path("bank")) == one


def test_a_bank_that_stores_zeros_is_of_the_same_model() -> None:
    whole, fewer = manifest(SPEC), manifest(FEWER)

    def check(written: Manifest, spec: MemorySpec) -> None:
        one = written
        written.check_model(
            model=one.model, name="", tokenizer=one.tokenizer, sink=one.sink, spec=spec, where=Path("bank")
        )

    check(whole, FEWER)
    check(fewer, FEWER)
    for written, spec in [(fewer, SPEC), (fewer, replace(FEWER, heads=((1, 1), (2, 2), (1, 1))))]:
        with pytest.raises(BankMismatchError, match="bank: the bank was written with another spec: heads"):
            check(written, spec)
    with pytest.raises(BankMismatchError, match="another spec: tokens 12 against 11"):
        check(whole, replace(FEWER, tokens=11))
