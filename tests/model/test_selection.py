"""Tokens that are selected are those that the model's own queries and keys, before rotation, make much of."""

import copy
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from m3model.attention.selection import attention_scores, most_attended, select
from m3model.transformers import MemoryModel, TransformersAdapter
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import BankMismatchError, ConfigError, InputError
from m3runtime.memory.tensors import MemoryTensors
from tests.model.banks import make_runtime
from tests.model.families import (
    FAMILIES,
    LAYERS,
    OTHERS,
    REFERENCE_TOKENS,
    make_adapter,
    make_model,
    make_tokenizer,
    oracle,
    random_text,
)

TOLERANCE = 1e-4
LENGTHS = (5, REFERENCE_TOKENS, 1, 14)
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
ROTATIONS: dict[str, dict[str, Any]] = {
    "cohere": {},  # neighbours are rotated, not halves
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},  # a part of the neighbours
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},  # layers without positions
    "phi3": {"partial_rotary_factor": 0.5},
    "llama": {
        "rope_parameters": {
            "rope_type": "yarn",  # scales what it rotates
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def texts_of(adapter: TransformersAdapter) -> list[str]:
    return [random_text(adapter.tokenizer, length, seed=length) for length in LENGTHS]


def ids_of(adapter: TransformersAdapter, text: str) -> list[int]:
    ids: list[int] = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def expected_scores(model: Any, sink: list[int], ids: list[int]) -> Tensor:
    """Scores of one reference by the stock model, out of what its projections and norms gave: ``[L, Hkv, T]``.

    Zero for KV heads that other layers alone have.
    """
    config = model.config
    heads = config.num_attention_heads
    seen: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            for name in ("q_proj", "k_proj", "qkv_proj", "q_norm", "k_norm"):
                if (module := getattr(layer.self_attn, name, None)) is not None:
                    hooks.callback(module.register_forward_hook(_keep(seen[index], name)).remove)
        # With the sink before it, as one text.
        oracle(model, sink, [], ids, offset=len(sink))
    rows = []
    for index, layer in enumerate(model.model.layers):
        dim, scaling = layer.self_attn.head_dim, layer.self_attn.scaling
        given = seen[index]
        kv_heads = heads // layer.self_attn.num_key_value_groups
        if "qkv_proj" in given:
            given["q_proj"], given["k_proj"], _ = given["qkv_proj"].split([heads * dim, *[kv_heads * dim] * 2], dim=-1)
        query = _by_head(given.get("q_norm", given["q_proj"]), heads, dim, len(sink))
        key = _by_head(given.get("k_norm", given["k_proj"]), kv_heads, dim, len(sink))
        softcap = getattr(layer.self_attn, "attn_logit_softcapping", None)
        scores = torch.zeros(kv_heads, len(ids), dtype=torch.float64)
        for head in range(heads):
            for asking in range(len(ids)):
                logits = key[head * kv_heads // heads] @ query[head, asking] * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                scores[head * kv_heads // heads] += logits.softmax(0)
        rows.append(scores)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _keep(into: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        into[name] = output.double()

    return hook


def _by_head(output: Tensor, heads: int, dim: int, sink: int) -> Tensor:
    """``[heads, T, dim]`` without the sink, of what norms and projections give: by token or by head, heads joined."""
    if output.ndim == 4 and output.shape[1] == heads:
        return output[0, :, sink:]
    return output[0].reshape(-1, heads, dim)[sink:].transpose(0, 1)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_scores_are_those_of_queries_and_keys_before_rotation(family: str) -> None:
    adapter = make_adapter(family)
    texts = texts_of(adapter)
    memories, scores = adapter.encode_scored(texts)
    most = max(shape.kv_heads for shape in adapter.layout.shapes)
    assert scores.shape == (len(texts), LAYERS, most, REFERENCE_TOKENS)
    assert scores.dtype == torch.float32
    for row, text in enumerate(texts):
        wanted = expected_scores(make_model(family), adapter.sink_ids, ids_of(adapter, text))
        tokens = int(memories.tokens[row])
        assert gap(scores[row, :, :, :tokens], wanted) < TOLERANCE
        assert not scores[row, :, :, tokens:].any()
        if tokens > 1:  # and tokens do differ
            assert all(float(layer[layer.any(1)].std(-1).min()) > 100 * TOLERANCE for layer in wanted)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_however_layers_rotate(kind: str) -> None:
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    size = {**_SMALL, **ROTATIONS[kind], **special, "vocab_size": len(make_tokenizer())}
    config = AutoConfig.for_model(kind, **size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    adapter = make_adapter(model=model)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=3)
    _, scores = adapter.encode_scored([text])
    assert gap(scores[0], expected_scores(model, adapter.sink_ids, ids_of(adapter, text))) < TOLERANCE


def test_logits_are_scaled_as_the_model_scales_them() -> None:
    model = copy.deepcopy(make_model("gemma2"))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.3
    adapter = make_adapter(model=model)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=3)
    _, scores = adapter.encode_scored([text])
    wanted = expected_scores(model, adapter.sink_ids, ids_of(adapter, text))
    assert gap(scores[0], wanted) < TOLERANCE
    assert gap(wanted, expected_scores(make_model("gemma2"), adapter.sink_ids, ids_of(adapter, text))) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layers", ["all", (1, 3)])
def test_scores_of_repeating_are_what_the_text_gives_to_its_memory(family: str, layers: Any) -> None:
    """Read off the stock model, which has sink, reference and the same text again as one text."""
    adapter, model = make_adapter(family, select_by="repeat", layers=layers), make_model(family)
    texts = texts_of(adapter)
    memories, scores = adapter.encode_scored(texts)
    plain, _ = make_adapter(family, layers=layers).encode_scored(texts)
    assert torch.equal(memories.keys, plain.keys)
    sink, shared = len(adapter.sink_ids), model.config.num_attention_heads // model.config.num_key_value_heads
    for row, text in enumerate(texts):
        ids = ids_of(adapter, text)
        count = len(ids)
        starts = [(0, sink), (sink, sink + count), (adapter.offset, adapter.offset + count)]
        positions = torch.cat([torch.arange(*one) for one in starts])
        hidden = torch.full((len(positions), len(positions)), torch.finfo(torch.float32).min).triu(1)
        if layers == "all":
            with torch.no_grad():
                read = model(
                    torch.tensor([[*adapter.sink_ids, *ids, *ids]]),
                    attention_mask=hidden[None, None],
                    position_ids=positions[None],
                    output_attentions=True,
                )
            given = torch.stack(read.attentions)[:, 0, :, -count:, sink : sink + count].sum(2)
            assert gap(scores[row, :, :, :count], torch.unflatten(given, 1, (-1, shared)).sum(2)) < TOLERANCE
        assert not scores[row, :, :, count:].any()
        assert float(scores[row, :, :, :count].sum(-1).max()) <= shared * count
    assert float(scores[0, 0, 0, : LENGTHS[0]].std()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "method"), [*((one, "attention") for one in (*FAMILIES, *OTHERS)), ("llama", "repeat")]
)
def test_a_batch_keeps_what_each_reference_keeps_alone(family: str, method: str) -> None:
    adapter = make_adapter(family, tokens_per_head=4, select_by=method)
    assert adapter.spec.tokens == 4
    texts = texts_of(adapter)
    together = adapter.encode(texts)
    together.check(adapter.spec)
    assert together.tokens.tolist() == [min(length, 4) for length in LENGTHS]
    for row, text in enumerate(texts):
        alone = adapter.encode([text])
        tokens = int(alone.tokens[0])
        assert gap(together.keys[row, :, :, :tokens], alone.keys[0]) < 1e-5
        assert gap(together.values[row, :, :, :tokens], alone.values[0]) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("layers", ["all", (1, 3)])
def test_kept_tokens_are_the_best_of_the_whole_memory(family: str, layers: Any) -> None:
    """Found in the memory of all tokens, bit by bit: so no token of the sink, and keys at their own positions."""
    adapter = make_adapter(family, tokens_per_head=4, layers=layers)
    dense = make_adapter(family, layers=layers)
    texts = texts_of(adapter)
    kept, whole = adapter.encode(texts), dense.encode(texts)
    _, scores = dense.encode_scored(texts)
    assert kept.keys.shape == (len(texts), len(adapter.spec.layers), adapter.spec.kv_heads, 4, adapter.spec.head_dim)
    different = set()
    for row, length in enumerate(LENGTHS):
        tokens = min(length, 4)
        assert int(kept.tokens[row]) == tokens
        for place, layer in enumerate(adapter.spec.layers):
            shape, both = adapter.layout.shapes[layer], zip((kept, whole), ("some", "all"), strict=True)
            of = {
                name: adapter.layout.unpacked((memories.keys[row, place], memories.values[row, place]), shape)
                for memories, name in both
            }
            for head in range(shape.kv_heads):
                own = scores[row, place, head].tolist()  # equal in the first layer, where a word stands twice
                chosen = sorted(sorted(range(length), key=own.__getitem__, reverse=True)[:tokens])
                different.add(tuple(chosen))
                for some, every in zip(of["some"], of["all"], strict=True):
                    assert torch.equal(some[head, :tokens], every[head, chosen])
    assert len(different) > len(LENGTHS)  # layers and heads choose for themselves


@pytest.mark.parametrize("count", [REFERENCE_TOKENS, REFERENCE_TOKENS + 1, 10**6])
def test_as_many_tokens_as_there_are_is_all(count: int) -> None:
    adapter, dense = make_adapter(tokens_per_head=count), make_adapter()
    assert adapter.spec == dense.spec
    texts = texts_of(adapter)
    one, other = adapter.encode(texts), dense.encode(texts)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)
    assert one.tokens.tolist() == list(LENGTHS)


def test_scoring_leaves_memories_and_model_as_they_are() -> None:
    adapter = make_adapter()
    texts = texts_of(adapter)
    plain = adapter.encode(texts)
    scored, scores = adapter.encode_scored(texts)
    assert torch.equal(scored.keys, plain.keys)
    assert torch.equal(scored.values, plain.values)
    # Each query gives away one, to tokens of the reference alone; two query heads share a KV head.
    assert torch.allclose(scores.sum(-1), 2.0 * plain.tokens[:, None, None])
    with pytest.raises(InputError, match="blank"):
        adapter.encode_scored(["walnut oil", " "])
    assert not any(module._forward_pre_hooks for module in adapter.model.modules())


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 7),
    scale=st.floats(0.05, 2),
    softcap=st.none() | st.floats(0.5, 50),
    seed=st.integers(0, 2**32),
)
def test_attention_scores(
    batch: int, kv_heads: int, group: int, tokens: int, scale: float, softcap: float | None, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, tokens, 4, generator=random)
    key = torch.randn(batch, kv_heads, tokens, 4, generator=random)
    valid = torch.rand(batch, tokens, generator=random) < 0.7
    valid[:, 0] = True
    got = attention_scores(query, key, valid, scale=scale, softcap=softcap)
    for row in range(batch):
        there = valid[row].nonzero()[:, 0]
        wanted = torch.zeros(kv_heads, tokens, dtype=torch.float64)
        for head in range(kv_heads * group):
            for asking in there:
                logits = key[row, head // group, there].double() @ query[row, head, asking].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                wanted[head // group, there] += logits.softmax(0)
        assert torch.allclose(got[row].double(), wanted, atol=1e-4)


@given(data=st.data(), width=st.integers(1, 9), count=st.integers(1, 10))
def test_the_highest_are_kept_the_earlier_of_equals_in_order(data: st.DataObject, width: int, count: int) -> None:
    # Few different values, so that many are equal; an experiment's own scores may be lower than those of padding.
    values = st.sampled_from([-1.0, 0.0, 1.0, 3.0])
    lengths = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    rows = [[data.draw(values) for _ in range(length)] + [0.0] * (width - length) for length in lengths]
    scores = torch.tensor(rows)[:, None, None].expand(-1, 2, 1, -1)
    kept = most_attended(scores, torch.tensor(lengths), count)
    assert kept.shape == (len(lengths), 2, 1, min(count, width))
    keys = torch.randn(len(lengths), 2, 1, width, 3)
    memories = MemoryTensors(keys, keys + 1, torch.tensor(lengths))
    chosen = select(memories, scores, count)
    for row, length in enumerate(lengths):
        ranked = sorted(range(length), key=lambda j: (-rows[row][j], j))
        wanted = sorted(ranked[:count])
        assert int(chosen.tokens[row]) == len(wanted)
        for layer in range(2):
            assert kept[row, layer, 0, : len(wanted)].tolist() == wanted
            assert torch.equal(chosen.keys[row, layer, 0, : len(wanted)], keys[row, layer, 0, wanted])
            assert torch.equal(chosen.values[row, layer, 0, : len(wanted)], keys[row, layer, 0, wanted] + 1)


def test_a_bank_of_few_tokens_is_read(tmp_path: Path) -> None:
    sparse, dense = make_adapter(tokens_per_head=4), make_adapter()
    texts = [random_text(sparse.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9, 3)]
    answers, sizes = [], []
    for adapter, name in [(sparse, "sparse"), (dense, "dense")]:
        with make_runtime(adapter, tmp_path / name, texts) as runtime:
            sizes.append(runtime.bank.home.slot_bytes)
            answers.append(MemoryModel(adapter, runtime).generate(texts[0], prompt="plain", max_new_tokens=12))
            recalled = runtime.fetch(list(answers[-1].memories), adapter.dtype)
            assert len(recalled) >= 2
            wanted = adapter.encode(texts)
            for id, (keys, values) in recalled.items():
                tokens = int(wanted.tokens[id])
                assert torch.equal(keys, wanted.keys[id, :, :, :tokens])
                assert torch.equal(values, wanted.values[id, :, :, :tokens])
    assert sizes[0] < sizes[1] / 5
    assert answers[0].tokens != answers[1].tokens
    alone = sparse.generate([sparse.render(texts[0], "plain")], None, GenerateConfig(max_new_tokens=12))
    assert answers[0].tokens != alone[0].tokens


def test_a_bank_of_another_count_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tokens_per_head=4)
    with make_runtime(adapter, tmp_path / "bank", ["walnut oil of the lamp"]) as runtime:
        for other in (make_adapter(tokens_per_head=5), make_adapter()):
            with pytest.raises(BankMismatchError, match=f"tokens 4 against {other.spec.tokens}"):
                MemoryModel(other, runtime)


def test_the_product_codec_learns_on_few_tokens() -> None:
    adapter = make_adapter(tokens_per_head=4)
    memories = adapter.encode([random_text(adapter.tokenizer, 12, seed=seed) for seed in range(24)])
    codec = ProductCodec(adapter.spec, key_bytes=8, value_bytes=8)
    codec.fit(memories)
    assert codec.distortion(memories).keys < 0.2
    assert codec.payload_bytes(4) == codec.encode(memories).shape[1]


def test_models_built_in_another_way_keep_all_tokens() -> None:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", vocab_size=320, bos_token_id=0, eos_token_id=1, pad_token_id=2, **size)
    model = AutoModelForCausalLM.from_config(config)
    make_adapter(model=model)
    make_adapter(model=model, tokens_per_head=4, select_by="repeat").encode(["walnut oil of the lamp"])
    with pytest.raises(ConfigError, match=r"^memory\.tokens_per_head must be all: a model of type gpt_neox ") as caught:
        make_adapter(model=model, tokens_per_head=4)
    assert "\n" not in str(caught.value)
