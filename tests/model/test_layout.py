"""Layers of several shapes: their memories are one tensor, and come out of it as they went in."""

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from m3model.attention.layout import AttentionLayout, LayerShape
from m3model.transformers import MemoryModel
from m3runtime.codecs.product.codec import ProductCodec
from tests.model.banks import make_runtime
from tests.model.families import REFERENCE_TOKENS, make_adapter, random_text

sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
shapes = st.lists(st.builds(LayerShape, st.integers(1, 4), sizes, sizes), min_size=1, max_size=5)


def layout_of(layers: list[LayerShape]) -> AttentionLayout:
    return AttentionLayout(shapes=tuple(layers), dtype=torch.float32, device=torch.device("cpu"))


@given(layers=shapes, tokens=st.integers(1, 4))
def test_what_is_packed_comes_out_as_it_was(layers: list[LayerShape], tokens: int) -> None:
    layout = layout_of(layers)
    for number, shape in enumerate(layers):
        keys = torch.arange(2.0 * shape.kv_heads * tokens * shape.key_dim).view(2, shape.kv_heads, tokens, -1) + 1
        values = -torch.arange(2.0 * shape.kv_heads * tokens * shape.value_dim).view(2, shape.kv_heads, tokens, -1) - 1
        packed = layout.packed((keys, values))
        for x, whole in zip(packed, (keys, values), strict=True):
            assert x.shape == (2, layout.kv_heads, tokens, layout.head_dim)
            assert int(x.count_nonzero()) == whole.numel()  # filled up with zeros, and nothing else
        back = layout.unpacked(packed, layout.shapes[number])
        assert all(torch.equal(x, y) for x, y in zip(back, (keys, values), strict=True))


@given(layers=shapes, data=st.data())
def test_every_layer_is_in_one_group(layers: list[LayerShape], data: st.DataObject) -> None:
    remembering = sorted(data.draw(st.sets(st.sampled_from(range(len(layers))))))
    layout = layout_of(layers)
    groups = layout.groups(remembering)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(layers)))
    memory = torch.tensor(remembering)[:, None, None, None].expand(-1, layout.kv_heads, 1, layout.head_dim)
    for group in groups:
        assert {layers[layer] for layer in group.layers} == {group.shape}
        assert {layer in remembering for layer in group.layers} == {group.remembers}
        if group.remembers:
            keys, _ = layout.of_group((memory, memory), group)
            assert keys[:, 0, 0, 0].tolist() == group.layers


def test_where_layers_are_alike_nothing_is_copied() -> None:
    layout = layout_of([LayerShape(2, 4, 4)] * 3)
    keys, values = torch.randn(2, 3, 2, 5, 4)
    assert layout.alike
    assert layout.packed((keys, values)) == (keys, values)
    (group,) = layout.groups(range(3))
    assert layout.of_group((keys, values), group)[0].data_ptr() == keys.data_ptr()


def test_a_codec_keeps_what_is_filled_up() -> None:
    adapter = make_adapter("gemma4_text")
    memories = adapter.encode([random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=seed) for seed in range(24)])
    filled = memories.keys.abs().sum((0, 3, 4)) == 0
    assert filled.any()
    codec = ProductCodec(adapter.spec)
    codec.fit(memories)
    back = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
    assert float(back.keys[:, filled].abs().max()) < 1e-6
    assert float((back.keys - memories.keys).norm() / memories.keys.norm()) < 0.3


def test_a_bank_holds_what_layers_have_and_one_with_zeros_is_read_as_well(tmp_path: Path) -> None:
    adapter = make_adapter("gemma4_text")
    assert adapter.spec.heads == ((2, 2), (4, 4)) * 2
    earlier = make_adapter("gemma4_text")
    earlier.spec = replace(earlier.spec, heads=())
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9, 3)]
    answers, sizes = [], []
    for written_by, name in [(adapter, "bank"), (earlier, "earlier")]:
        with make_runtime(written_by, tmp_path / name, texts) as runtime:
            sizes.append(runtime.bank.home.slot_bytes - 64)  # without its header
            answers.append(MemoryModel(adapter, runtime).generate(texts[0], prompt="plain", max_new_tokens=12))
    assert answers[0].memories == answers[1].memories
    assert answers[0].tokens == answers[1].tokens
    assert sizes[0] * 4 == sizes[1] * 3
