"""A Memory³ model: its training forward is plain concatenation, and what the adapter reads afterwards."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from m3model.attention.implementation import prepare
from m3model.memory3 import NO_LABEL, Memory3Config, Memory3ForCausalLM, register
from m3model.training.run import memory3_config
from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import Config, MemoryConfig, ModelConfig
from m3runtime.errors import ConfigError
from tests.model.families import ALIKE, LAYERS, REFERENCE_TOKENS, make_model, make_tokenizer, windows, with_masks

CPU = torch.device("cpu")
CHUNK = 6
MEMORIES = 2
SINK = (0, 11, 12)
LENGTHS = ((REFERENCE_TOKENS, 9, 0), (5, 14, 1))
"""Tokens of the reference of each chunk of two texts; 0: it has none."""
TEXT = 2 * CHUNK + 3


def memory3(family: str = "llama", *, tokens: int = REFERENCE_TOKENS, layers: Sequence[int] | None = None) -> Any:
    model = copy.deepcopy(make_model(family))
    config = Memory3Config(
        text_config=model.config,
        memory_layers=None if layers is None else list(layers),
        tokens_per_head=tokens,
        reference_tokens=REFERENCE_TOKENS,
        sink_ids=list(SINK),
        chunk_tokens=CHUNK,
        memories=MEMORIES,
    )
    return Memory3ForCausalLM.holding(model, config).eval()


def batch(lengths: Sequence[Sequence[int]] = LENGTHS, text: int = TEXT, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    references = torch.randint(4, 300, (*counts.shape, REFERENCE_TOKENS), generator=generator)
    references *= torch.arange(REFERENCE_TOKENS) < counts[..., None]
    ids = torch.randint(4, 300, (len(lengths), text), generator=generator)
    return {"input_ids": ids, "labels": ids, "references": references, "reference_counts": counts}


def concatenated(model: Any, inputs: dict[str, Tensor], kept: dict[int, Tensor] | None) -> Tensor:
    """The logits of each text by the stock model over ``[sink | references | text]``, one row after the other.

    ``kept`` has of each memory layer which tokens of which reference a KV head keeps, ``bool[B, chunks, kv_heads, R]``.
    """
    inner, config = model.language_model, model.config
    rows = []
    for row in range(len(inputs["input_ids"])):
        counts = inputs["reference_counts"][row].tolist()
        segments = [torch.tensor(SINK)]
        segments += [inputs["references"][row, chunk, :count] for chunk, count in enumerate(counts)]
        segments.append(inputs["input_ids"][row])
        starts = [0, *(len(SINK) for _ in counts), len(SINK) + REFERENCE_TOKENS]
        positions = torch.cat([start + torch.arange(len(part)) for start, part in zip(starts, segments, strict=True)])
        segment = torch.cat([torch.full((len(part),), number) for number, part in enumerate(segments)])
        last = len(counts) + 1
        chunk_of = torch.full_like(segment, -1)
        chunk_of[segment == last] = torch.arange(TEXT) // CHUNK
        age = chunk_of[:, None] - (segment[None] - 1)
        reads = (segment[:, None] == last) & (segment[None] > 0) & (segment[None] < last)
        reads &= (age >= 0) & (age < MEMORIES)
        same = segment[:, None] == segment[None]
        distance = positions[:, None] - positions[None]
        heads = inner.config.num_attention_heads
        group = heads // (getattr(inner.config, "num_key_value_heads", None) or heads)
        masks = []
        for layer, window in enumerate(windows(inner)):
            own = same & (distance >= 0)
            if window is not None:
                own &= distance < window
            seen = (own | ((segment[None] == 0) & ~same)).expand(heads, -1, -1).clone()
            if layer in config.memory_layers:
                seen |= reads
                if kept is not None:
                    tokens = torch.cat([kept[layer][row, chunk, :, :n] for chunk, n in enumerate(counts)], dim=1)
                    columns = (segment > 0) & (segment < last)
                    reading = segment == last
                    allowed = torch.ones(heads, len(segment), dtype=torch.bool)
                    allowed[:, columns] = tokens.repeat_interleave(group, 0)
                    seen &= allowed[:, None] | ~reading[None, :, None]
            masks.append(torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None])
        with with_masks(inner, masks):
            logits = inner(torch.cat(segments)[None], position_ids=positions[None], use_cache=False).logits[0]
        rows.append(logits[-TEXT:])
    return torch.stack(rows)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def kept_by(model: Any, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """Which tokens a model keeps, found by comparing its keys with those of the same model that keeps all."""
    everything = copy.deepcopy(model)
    everything.config.tokens_per_head = REFERENCE_TOKENS
    with torch.no_grad():
        some = model.encode(inputs["references"], inputs["reference_counts"])
        every = everything.encode(inputs["references"], inputs["reference_counts"])
    found = {}
    for layer, (keys, _) in some.parts.items():
        equal = (every.parts[layer][0][:, :, :, None] == keys[:, :, None]).all(-1)  # [n, kv_heads, R, K]
        exists = torch.arange(keys.shape[2]) < some.tokens[:, None]
        found[layer] = (equal & exists[:, None, None]).any(-1)[some.places]
    return found


def exact(model: Any) -> Any:
    """The model in float64 throughout: the library's norms compute in float32, whatever they are given."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            one = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            epsilon = getattr(module, "variance_epsilon", None) or module.eps

            def norm(x: Tensor, module: Any = module, one: float = one, epsilon: float = epsilon) -> Tensor:
                return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (module.weight + one)

            module.forward = norm
    return model.double()


@pytest.mark.parametrize("tokens", [REFERENCE_TOKENS, 4], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-sliding", "gemma3_text", "olmo2"])
def test_logits_and_gradients_are_those_of_plain_concatenation(family: str, tokens: int) -> None:
    model = exact(memory3(family, tokens=tokens, layers=(0, 2)))
    prepare(model)
    inputs = batch()
    kept = kept_by(model, inputs) if tokens < REFERENCE_TOKENS else None
    found = model(**{**inputs, "labels": None}).logits
    loss_of(found, inputs["labels"]).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    model.set_attn_implementation("sdpa")  # eager attention has its softmax in float32
    wanted = concatenated(model, inputs, kept)
    loss_of(wanted, inputs["labels"]).backward()
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)
    for name, parameter in model.named_parameters():
        difference = (gradients[name] - parameter.grad).abs().max()
        assert difference < 1e-8, f"{name}: {difference}"
    first = next(name for name in gradients if name.endswith("k_proj.weight"))
    assert gradients[first].abs().max() > 1e-4


def test_gradients_flow_through_memories() -> None:
    """A text's first chunk depends on its reference, and the reference's embeddings get a gradient of it."""
    model = memory3(tokens=4)
    inputs = batch()
    model(**inputs).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    only_there = set(inputs["references"][0, 0].tolist()) - set(inputs["input_ids"].flatten().tolist())
    assert any(gradient[token].abs().sum() > 0 for token in only_there)


def carried_adapter(model: Any) -> TransformersAdapter:
    tokenizer = make_tokenizer(eos=False)
    model.config.sink_ids = [0, *tokenizer("Reference:", add_special_tokens=False)["input_ids"]]
    return TransformersAdapter(model, tokenizer, MemoryConfig(), "memory3")


@pytest.mark.parametrize("tokens", [REFERENCE_TOKENS, 4], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", [*ALIKE, "nemotron"])
def test_the_adapter_reads_what_training_read(family: str, tokens: int) -> None:
    model = memory3(family, tokens=tokens)
    adapter = carried_adapter(model)
    tokenizer = adapter.tokenizer
    words = ["the harbour lamp of the old town", "walnut oil", "seven keepers rowed out with blue lanterns"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:REFERENCE_TOKENS] for text in words]
    texts = [tokenizer.decode(row) for row in ids]
    assert [adapter.ids(text) for text in texts] == ids
    width = max(map(len, ids))
    inputs = batch(((1, 1, 1),))["input_ids"]
    with torch.no_grad():
        wanted = model(
            inputs,
            references=torch.tensor([[row + [0] * (width - len(row)) for row in ids]]),
            reference_counts=torch.tensor([[len(row) for row in ids]]),
        ).logits[0]

    memories = adapter.encode(texts)
    parts = [
        (memories.keys[row, :, :, :count], memories.values[row, :, :, :count])
        for row, count in enumerate(memories.tokens.tolist())
    ]
    session = adapter.session(1)
    found = []
    for chunk, part in enumerate(inputs[0].split(CHUNK)):
        session.read([parts[max(0, chunk + 1 - MEMORIES) : chunk + 1]])
        found.append(session.all_logits(part[None])[0])
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=0)


def test_without_references_it_is_the_model() -> None:
    model = memory3()
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, model.language_model(ids, labels=ids).loss)
        before = model(ids).logits
        prepare(model)  # as the adapter does
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
        padded = torch.ones_like(ids)
        padded[1, -4:] = 0
        torch.testing.assert_close(model(ids, padded).logits[1, :-4], before[1, :-4], atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.lists(st.integers(0, REFERENCE_TOKENS), min_size=3, max_size=3), min_size=1, max_size=3),
    tokens=st.integers(1, REFERENCE_TOKENS),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=20)
def test_padding_and_neighbours_change_nothing(lengths: list[list[int]], tokens: int, seed: int) -> None:
    """A text's logits depend on its own references alone, and not on what stands where a reference has no token."""
    model = memory3(tokens=tokens)
    inputs = batch(lengths, seed=seed)
    inputs["references"] += 7 * (torch.arange(REFERENCE_TOKENS) >= inputs["reference_counts"][..., None])
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(len(lengths)):
            alone = model(**{name: value[row : row + 1] for name, value in batch(lengths, seed=seed).items()}).logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_chunk_sees_its_reference_and_those_before_it_in_the_window() -> None:
    model = memory3()
    inputs = batch(((8, 8, 8),))
    with torch.no_grad():
        before = model(**inputs).logits[0]
        for chunk in range(3):
            changed = {**inputs, "references": inputs["references"].clone()}
            changed["references"][0, chunk, :8] = torch.arange(100, 108)
            differs = (model(**changed).logits[0] - before).abs().amax(-1) > 1e-6
            seen = [any(differs[place : place + CHUNK]) for place in range(0, TEXT, CHUNK)]
            # Through attention to earlier text, what a chunk read reaches all later ones.
            assert seen == [at >= chunk for at in range(3)]
            direct = before.new_zeros(3, dtype=torch.bool)
            direct[chunk : chunk + MEMORIES] = True
            assert not differs[: chunk * CHUNK].any()


def test_labels_that_are_left_out_count_for_nothing() -> None:
    model = memory3()
    inputs = batch()
    labels = inputs["labels"].clone()
    labels[1] = NO_LABEL
    with torch.no_grad():
        alone = model(**{name: value[:1] for name, value in inputs.items()}).loss
        torch.testing.assert_close(model(**{**inputs, "labels": labels}).loss, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3_text"])
def test_saved_and_loaded_by_the_auto_classes(family: str, tmp_path: Path) -> None:
    model = memory3(family, tokens=4, layers=(1, 2))
    inputs = batch()
    with torch.no_grad():
        wanted = model(**inputs).logits
    model.save_pretrained(tmp_path)
    make_tokenizer(eos=False).save_pretrained(tmp_path)
    register()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, Memory3Config)
    assert (config.memory_layers, config.tokens_per_head, config.sink_ids) == ([1, 2], 4, list(SINK))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, Memory3ForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, wanted, atol=0, rtol=0)

    adapter = TransformersAdapter.open(ModelConfig(path=str(tmp_path)), MemoryConfig(), CPU)
    carried = TransformersAdapter.carried(ModelConfig(path=str(tmp_path)), MemoryConfig())
    assert (carried.layers, carried.tokens_per_head, carried.reference_tokens) == ((1, 2), 4, REFERENCE_TOKENS)
    spec = adapter.spec
    assert (spec.layers, spec.tokens, spec.reference_tokens) == ((1, 2), 4, REFERENCE_TOKENS)
    tried = TransformersAdapter.open(ModelConfig(path=str(tmp_path)), MemoryConfig(layers="all"), CPU)
    assert tried.spec.layers == tuple(range(LAYERS))


def test_specs_that_no_model_has_are_refused() -> None:
    text = copy.deepcopy(make_model("llama").config)  # which takes on what the whole is run with
    with pytest.raises(ValueError, match=r"layers 0 to 3, not \[2, 4\]"):
        Memory3Config(text_config=text, memory_layers=[2, 4])
    with pytest.raises(ValueError, match="tokens_per_head"):
        Memory3Config(text_config=text, tokens_per_head=9, reference_tokens=8)
    assert Memory3Config(text_config=text).memory_layers == [0, 1]


def test_heads_of_several_shapes_are_not_trained_to_choose_tokens() -> None:
    config = Config.model_validate(
        {"bank": "bank", "model": {"path": "m"}, "embedder": {"path": "e"}, "memory": {"tokens_per_head": 4}}
    )
    with pytest.raises(ConfigError, match=r"^memory\.tokens_per_head must be all: the layers of this model have"):
        memory3_config(copy.deepcopy(make_model("gemma4_text")), make_tokenizer(), config)
    by_repeat = config.model_copy(update={"memory": config.memory.model_copy(update={"select_by": "repeat"})})
    with pytest.raises(ConfigError, match=r"^memory\.select_by must be attention"):
        memory3_config(copy.deepcopy(make_model("llama")), make_tokenizer(), by_repeat)
    model = copy.deepcopy(make_model("llama"))
    assert memory3_config(model, make_tokenizer(), config).tokens_per_head == 4


def test_more_text_than_chunks_is_refused() -> None:
    inputs = batch()
    with pytest.raises(ValueError, match="19 tokens has 4 chunks, not 3"):
        memory3()(**{**inputs, "input_ids": torch.ones(2, 19, dtype=torch.int64), "labels": None})


def test_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient checkpointing"):
        memory3().gradient_checkpointing_enable()
