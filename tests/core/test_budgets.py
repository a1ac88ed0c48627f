"""Budgets of heads: what a head does not keep takes no bytes, and changes nothing of what others keep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.bank.manifest import UNEVEN as UNEVEN_FORMAT
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.config.schema import MemoryConfig
from m3runtime.errors import BankMismatchError, CodecError, ConfigError
from m3runtime.memory.shape import memory_spec
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import kept
from m3runtime.testing.codec import SPEC, UNEVEN, make_memories
from tests.core.test_heads_of_layers import manifest


def of(budgets: list[list[int]]) -> MemorySpec:
    """`SPEC` with these budgets, of which the first one is all of its tokens."""
    return replace(SPEC, budgets=((12, *budgets[0][1:]), *map(tuple, budgets[1:])))


def differ(budgets: list[list[int]]) -> bool:
    return any(one != 12 for one in [*budgets[0][1:], *budgets[1], *budgets[2]])


BUDGETS = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=2), min_size=3, max_size=3).filter(differ)


@given(BUDGETS)
def test_a_spec_is_read_as_it_was_written(budgets: list[list[int]]) -> None:
    spec = of(budgets)
    assert MemorySpec.from_json(spec.to_json()) == spec
    assert "budgets" in spec.to_json()
    assert "budgets" not in SPEC.to_json()
    assert not spec.dense
    for tokens in (1, 7, 12):
        every = [min(tokens, one) for layer in spec.budgets for one in layer]
        assert spec.numbers(tokens) == 2 * 16 * sum(every)
        assert int(kept(spec, tokens).sum()) == sum(every)
        assert SPEC.numbers(tokens) == tokens * SPEC.numbers_per_token


@pytest.mark.parametrize(
    ("budgets", "told"),
    [
        (((12, 1), (2, 2)), "budgets must be those of 3 layers of 2 KV heads"),
        (((12, 1), (2,), (2, 2)), "budgets must be those of 3 layers of 2 KV heads"),
        (((12, 0), (2, 2), (2, 2)), "budgets must differ, from 1 to 12 tokens"),
        (((13, 1), (2, 2), (2, 2)), "budgets must differ, from 1 to 12 tokens"),
        (((11, 1), (2, 2), (2, 2)), "budgets must differ, from 1 to 12 tokens"),
        (((12, 12),) * 3, "budgets must differ, from 1 to 12 tokens"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(budgets: tuple[tuple[int, ...], ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(SPEC, budgets=budgets)
    stated = {**SPEC.to_json(), "budgets": [list(layer) for layer in budgets]}
    with pytest.raises(ConfigError, match="budgets must"):
        MemorySpec.from_json(stated)
    with pytest.raises(ConfigError, match="not a memory spec"):
        MemorySpec.from_json({**stated, "budgets": [[12, True], [2, 2], [2, 2]]})
    with pytest.raises(ConfigError, match="budgets need layers that all have the same heads"):
        replace(UNEVEN, heads=((1, 2), (2, 2), (2, 2)))


def configured(kept: object) -> MemorySpec:
    memory = MemoryConfig.model_validate({"tokens_per_head": kept, "reference_tokens": 24})
    return memory_spec(memory, layers=2, kv_heads=2, head_dim=16, dtype="float32")


def test_a_configuration_has_budgets_of_heads() -> None:
    spec = configured([[40, 3], [5, 24]])
    assert (spec.tokens, spec.budgets) == (24, ((24, 3), (5, 24)))
    assert (configured([[7, 7], [7, 7]]).tokens, configured([[7, 7], [7, 7]]).budgets) == (7, ())
    assert configured([[99, 24], [30, 24]]).dense
    for wrong in ([[4, 3]], [[4, 3], [5]], [[4, 3], [5, 1], [1, 1]]):
        with pytest.raises(ConfigError, match=r"memory.tokens_per_head: the model has 2 memory layers of 2 KV heads"):
            configured(wrong)


@given(BUDGETS, st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_a_payload_has_the_bytes_of_what_heads_keep(budgets: list[list[int]], tokens: list[int]) -> None:
    spec, memories = of(budgets), make_memories([12, *tokens], spec=of(budgets))
    for codec, fixed, each in (
        (RawCodec(spec), 0, 4),
        (RawCodec(spec, "float16"), 0, 2),
        (ScalarCodec(spec), 2 * 2 * 2 * 6 * 16, 1),
    ):
        payloads = codec.encode(memories)
        for payload, own in zip(payloads, memories.tokens.tolist(), strict=True):
            assert codec.payload_bytes(own) == fixed + each * spec.numbers(own)
            alone = codec.decode(payload[None, : codec.payload_bytes(own)], torch.tensor([own]), torch.float32)
            assert alone.keys.shape[3] == own
        decoded = codec.decode(payloads, memories.tokens, torch.float32)
        exists = memories.exists()[:, None, None] & kept(spec, 12)
        for true, back in ((memories.keys, decoded.keys), (memories.values, decoded.values)):
            tolerance = 0 if isinstance(codec, RawCodec) and each == 4 else 0.05
            torch.testing.assert_close(back[exists], true[exists], rtol=tolerance, atol=tolerance)
            assert not back[~exists].any()


def test_heads_that_keep_all_are_coded_as_without_budgets() -> None:
    memories, whole = make_memories([12, 5], spec=UNEVEN), make_memories([12, 5])
    uneven, even = ScalarCodec(UNEVEN, 4), ScalarCodec(SPEC, 4)
    found = uneven.decode(uneven.encode(memories), memories.tokens, torch.float32)
    wanted = even.decode(even.encode(whole), whole.tokens, torch.float32)
    for layer, head in ((0, 0), (1, 1)):
        assert torch.equal(found.keys[:, layer, head], wanted.keys[:, layer, head])
        assert torch.equal(found.values[:, layer, head], wanted.values[:, layer, head])


def test_the_product_codec_spends_bytes_where_heads_keep_tokens() -> None:
    codec = ProductCodec(UNEVEN, bytes=8)
    assert codec.options == {"bytes": 8, "together": "head"}
    most = 8 * sum(map(sum, UNEVEN.budgets))
    assert codec.payload_bytes(12) == most
    codec.fit(make_memories([12, 9] * 24, seed=1, spec=UNEVEN))
    assert 0.95 * most <= codec.payload_bytes(12) <= most
    with pytest.raises(CodecError, match="together of the product codec must be head where heads keep"):
        ProductCodec(UNEVEN, together="layer")


def test_a_codec_is_not_trained_on_what_heads_do_not_keep() -> None:
    sample = make_memories([12, 9] * 24, seed=1, spec=UNEVEN)
    other = make_memories([12, 9] * 24, seed=1, spec=UNEVEN)
    for x in (other.keys, other.values):
        x.nan_to_num_(nan=1e4)
    for options in ({"bytes": 8}, {"key_bytes": 4, "value_bytes": 2}):
        codecs = [ProductCodec(UNEVEN, **options) for _ in range(2)]  # type: ignore[arg-type]
        for codec, memories in zip(codecs, (sample, other), strict=True):
            codec.fit(memories)
        assert codecs[0].fingerprint == codecs[1].fingerprint


def test_a_bank_of_budgets_has_a_format_of_its_own() -> None:
    one, even = manifest(UNEVEN), manifest(SPEC)
    assert (one.format, even.format) == (UNEVEN_FORMAT, 1)
    assert b"budgets" not in even.to_bytes()
    assert Manifest.from_bytes(one.to_bytes(), Path("bank")) == one
    other = replace(UNEVEN, budgets=((12, 4), *UNEVEN.budgets[1:]))
    for written, spec in ((one, other), (one, SPEC), (even, UNEVEN)):
        with pytest.raises(BankMismatchError, match=r"written with another spec: budgets .{,200}; configure"):
            written.check_model(model="m" * 32, name="", tokenizer="t" * 32, sink="Reference:", spec=spec, where=Path())
