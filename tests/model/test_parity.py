"""The parity law: a memory gives the logits of the same text in the context."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from m3model.attention.implementation import Weighing, attend
from m3model.engine.session import Session
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig, MemoryConfig
from m3runtime.errors import ConfigError, InputError
from m3runtime.recall.lease import Part
from tests.model.families import (
    BOUNDED,
    FAMILIES,
    FIXED_POSITIONS,
    REFERENCE_TOKENS,
    ROPES,
    SLIDING,
    WINDOW,
    make_adapter,
    make_model,
    oracle,
    random_text,
    windows,
)

CONTEXT = 33
TOLERANCE = 2e-4  # packed weights round up to twice as much as the library's products


def parts(adapter: TransformersAdapter, texts: Sequence[str]) -> list[Part]:
    memories = adapter.encode(texts)
    return [
        (memories.keys[row, :, :, :tokens], memories.values[row, :, :, :tokens])
        for row, tokens in enumerate(memories.tokens.tolist())
    ]


def whole(session: Session, context: Tensor) -> Tensor:
    return session.all_logits(context[None])[0]


def chunked(session: Session, context: Tensor) -> Tensor:
    return torch.cat([session.all_logits(part[None])[0] for part in context.split(7)])


def token_by_token(session: Session, context: Tensor) -> Tensor:
    rows = [session.forward(token[None, None]) for token in context]
    return torch.cat([row for row in rows if row is not None])


def padded(session: Session, context: Tensor) -> Tensor:
    """Prompts of other lengths would pad it like this. Logits are those of the last token of each call."""
    rows = []
    for token in context:
        tokens = torch.cat([token[None], torch.tensor([1, 2])])[None]
        rows.append(session.forward(tokens, [1]))
    return torch.cat([row for row in rows if row is not None])


WAYS = [whole, chunked, token_by_token, padded]
Way = Callable[[Session, Tensor], Tensor]


def ids_of(adapter: TransformersAdapter, text: str) -> list[int]:
    ids: list[int] = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def context_of(adapter: TransformersAdapter) -> Tensor:
    return torch.tensor(ids_of(adapter, random_text(adapter.tokenizer, CONTEXT, seed=99)))


def read(adapter: TransformersAdapter, texts: Sequence[str], way: Way = whole, **read: Any) -> Tensor:
    session = adapter.session(1, context=4)
    session.read([parts(adapter, texts)], **read)
    return way(session, context_of(adapter))


def expect(adapter: TransformersAdapter, texts: Sequence[str], model: Any, **options: Any) -> Tensor:
    references = [ids_of(adapter, text) for text in texts]
    context = context_of(adapter).tolist()
    return oracle(model, adapter.sink_ids, references, context, offset=adapter.offset, **options)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_memory_gives_the_logits_of_its_text(family: str, way: Way) -> None:
    adapter, model = make_adapter(family), make_model(family)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    wanted = expect(adapter, [text], model)
    assert gap(read(adapter, [text], way), wanted) < TOLERANCE
    if family not in SLIDING:
        # Nothing but the text: the stock model without any mask of ours.
        ids = [*adapter.sink_ids, *ids_of(adapter, text), *context_of(adapter).tolist()]
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0, -CONTEXT:]
        assert gap(plain, wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_law_is_strict(family: str) -> None:
    """Mistakes that the tests above must catch change logits by far more than their tolerance."""
    adapter = make_adapter(family)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    right = read(adapter, [text])
    context = context_of(adapter)

    def wrong(memories: list[Part], *, offset: int = adapter.offset, sink: bool = True) -> Tensor:
        session = Session(
            adapter.model,
            batch=1,
            memory_layers=adapter.spec.layers,
            sink=adapter._sink if sink else None,
            offset=offset,
        )
        session.read([memories])
        return whole(session, context)

    [(keys, values)] = parts(adapter, [text])
    mistakes = {
        "none": wrong([(keys, values)]),
        "no memory": wrong([]),
        "shifted": wrong([(keys, values)], offset=adapter.offset + 1),
        "no sink": wrong([(keys, values)], sink=False),
        "first token missing": wrong([(keys[:, :, 1:], values[:, :, 1:])]),
        "last token missing": wrong([(keys[:, :, :-1], values[:, :, :-1])]),
        "layers swapped": wrong([(keys.flip(0), values.flip(0))]),
    }
    if adapter.layout.kv_heads > 1:
        mistakes["heads swapped"] = wrong([(keys.flip(1), values.flip(1))])
    assert gap(mistakes.pop("none"), right) == 0
    assert {name: gap(logits, right) for name, logits in mistakes.items() if gap(logits, right) < 100 * TOLERANCE} == {}


@pytest.mark.parametrize("family", SLIDING)
def test_memory_is_seen_through_a_sliding_window(family: str) -> None:
    adapter, model = make_adapter(family), make_model(family)
    assert WINDOW in windows(model)
    assert WINDOW < REFERENCE_TOKENS
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    sliding = [layer for layer, window in enumerate(windows(model)) if window]
    full = [layer for layer in range(len(windows(model))) if layer not in sliding]
    hidden = expect(adapter, [text], model, memory_layers=full)
    # The last tokens of the context are further from the memory than the window reaches.
    assert gap(read(adapter, [text])[2 * WINDOW :], hidden[2 * WINDOW :]) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [whole, padded])
def test_memories_stand_in_parallel_positions(family: str, way: Way) -> None:
    adapter = make_adapter(family)
    lengths = [REFERENCE_TOKENS, 1, 17]
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in lengths]
    assert gap(read(adapter, texts, way), expect(adapter, texts, make_model(family))) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["first-half", (1, 3)])
def test_layers_without_memory_ignore_it(family: str, layers: Any) -> None:
    adapter = make_adapter(family, layers=layers)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    model = make_model(family)
    assert adapter.spec.layers == ((0, 1) if layers == "first-half" else layers)
    wanted = expect(adapter, texts, model, memory_layers=adapter.spec.layers)
    assert gap(wanted, expect(adapter, texts, model)) > 100 * TOLERANCE
    for way in WAYS:
        assert gap(read(adapter, texts, way), wanted) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_in_a_batch_is_encoding_alone(family: str) -> None:
    adapter = make_adapter(family)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (5, REFERENCE_TOKENS, 1, 14)]
    together = adapter.encode(texts)
    together.check(adapter.spec)
    assert together.tokens.tolist() == [5, REFERENCE_TOKENS, 1, 14]
    for row, text in enumerate(texts):
        alone = adapter.encode([text])
        tokens = int(alone.tokens[0])
        assert gap(together.keys[row, :, :, :tokens], alone.keys[0]) < 1e-5
        assert gap(together.values[row, :, :, :tokens], alone.values[0]) < 1e-5


def test_what_cannot_be_encoded_is_refused() -> None:
    adapter = make_adapter()
    with pytest.raises(InputError, match="no reference"):
        adapter.encode([])
    with pytest.raises(InputError, match="blank"):
        adapter.encode(["walnut oil", " \n"])
    with pytest.raises(InputError, match=f"at most {REFERENCE_TOKENS} tokens, not {REFERENCE_TOKENS + 1}"):
        adapter.encode([random_text(adapter.tokenizer, REFERENCE_TOKENS + 1, seed=0)])


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma2"])
def test_rows_with_memories_of_their_own(family: str) -> None:
    """Rows with none, one and three memories that change on the way, each as if it were alone."""
    adapter, model = make_adapter(family), make_model(family)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (4, 20, 11)]
    memories = parts(adapter, texts)
    context = context_of(adapter)
    choices: list[list[list[int]]] = [[[], [1], [0, 1, 2]], [[2, 0], [], [1]], [[0], [0], [0]]]
    session = adapter.session(3, context=4)
    alone = [adapter.session(1) for _ in range(3)]
    for step, choice in enumerate(choices):
        session.read([[memories[i] for i in row] for row in choice])
        tokens = context[step * 11 : step * 11 + 11]
        together = session.all_logits(tokens.repeat(3, 1))
        for row, one in enumerate(alone):
            one.read([[memories[i] for i in choice[row]]])
            assert gap(one.all_logits(tokens[None])[0], together[row]) < TOLERANCE
    wanted = oracle(model, adapter.sink_ids, [], context[:11].tolist(), offset=adapter.offset)
    first = adapter.session(1)
    assert gap(first.all_logits(context[None, :11])[0], wanted) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2"])
def test_a_row_that_waits_is_not_disturbed(family: str) -> None:
    """A row without any token of its own yet stays clean: what it must not see is masked, not infinite."""
    adapter = make_adapter(family)
    context = context_of(adapter)
    session = adapter.session(2, memories=False)
    session.forward(context[:6].repeat(2, 1), [0, 6])
    together = session.all_logits(context[None, :9].repeat(2, 1))
    assert gap(adapter.session(1, memories=False).all_logits(context[None, :9])[0], together[0]) < TOLERANCE


def test_a_cache_takes_only_what_fits_it() -> None:
    adapter = make_adapter()
    session = adapter.session(2)
    memory = parts(adapter, ["walnut oil"])
    with pytest.raises(ValueError, match="batch of 2"):
        session.read([memory])
    with pytest.raises(ValueError, match="batch of 2"):
        session.read([memory, memory], [[0.0], []])
    session.forward(torch.tensor([[1], [2]]))
    with pytest.raises(RuntimeError, match="before anything else"):
        session.cache.put_sink(*adapter._sink)


# -- RoPE and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("way", [whole, token_by_token])
def test_every_kind_of_rope_keeps_the_law(rope: str, way: Way) -> None:
    adapter, model = make_adapter(rope), make_model(rope)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    for chosen in [texts[:1], texts]:
        assert gap(read(adapter, chosen, way), expect(adapter, chosen, model)) < TOLERANCE


@pytest.mark.parametrize("rope", BOUNDED)
def test_positions_beyond_which_all_keys_change_are_refused(rope: str) -> None:
    adapter, model = make_adapter(rope), make_model(rope)
    long = context_of(adapter).repeat(4)
    within, beyond = long[: FIXED_POSITIONS - adapter.offset], long[: FIXED_POSITIONS - adapter.offset + 1]
    session = adapter.session(1, context=4)
    session.read([parts(adapter, [random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)])])
    session.all_logits(within[None])
    with pytest.raises(InputError, match=rf"needs {FIXED_POSITIONS + 1} positions") as caught:
        session.forward(beyond[None, -1:])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="positions"):
        adapter.generate([Prompt("lamp")], None, GenerateConfig(max_new_tokens=FIXED_POSITIONS))
    # A longer text changes what the stock model makes of all tokens before its end.
    ids = long[None, : FIXED_POSITIONS + 2]
    with torch.no_grad():
        short, grown = model(ids[:, :-2]).logits[0], model(ids).logits[0, :-2]
    assert gap(short, grown) > 100 * TOLERANCE


def test_an_unknown_kind_of_rope_is_refused() -> None:
    model = copy.deepcopy(make_model("llama"))
    model.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(ConfigError, match=r"RoPE of type 'spiral'.*use a model with") as caught:
        make_adapter(model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma2", "qwen2-yarn", "phi3-partial"])
def test_half_precision_keeps_the_law_to_its_rounding(family: str, dtype: torch.dtype) -> None:
    """In half precision no number is right to 1e-4, so the dtype itself is the measure.

    A memory is as near to the float32 logits of its text as the text is in half precision: at most 1.5 times as far, in
    root mean square (rounding varies with the order of sums). A mistake is further off by many times as much.
    """
    adapter, model = make_adapter(model=copy.deepcopy(make_model(family)).to(dtype)), make_model(family)
    text = random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)
    right = expect(adapter, [text], model)
    rounded = rms(expect(adapter, [text], copy.deepcopy(model).to(dtype)), right)
    for way in WAYS:
        assert rms(read(adapter, [text], way), right) < 1.5 * rounded
    moved = adapter.session(1, context=4)
    moved.read([[(keys.roll(1, 2), values) for keys, values in parts(adapter, [text])]])
    assert rms(whole(moved, context_of(adapter)), right) > 4 * rounded


def rms(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).square().mean().sqrt())


# -- weighing memories ----------------------------------------------------------------------------------------------


def explicit_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    temperatures: Tensor,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention head by head, whose logits are divided by ``temperatures`` (``[Q, K]``)."""
    heads = query.shape[1]
    shared = heads // key.shape[1]
    rows = []
    for head in range(heads):
        logits = query[:, head] @ key[:, head // shared].transpose(1, 2) * scaling / temperatures
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits + attention_mask[:, 0]
        if s_aux is not None:
            logits = torch.cat([logits, s_aux[head].expand(*logits.shape[:2], 1)], 2)
        rows.append(logits.softmax(-1)[..., : key.shape[2]] @ value[:, head // shared])
    return torch.stack(rows, dim=2), None


AttentionInterface.register("explicit", explicit_attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_weights_are_added_to_the_logits(family: str) -> None:
    adapter, model = make_adapter(family), make_model(family)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    weights = [-0.25, -2.5]
    wanted = expect(adapter, texts, model, log_weights=weights)
    assert gap(wanted, expect(adapter, texts, model)) > 100 * TOLERANCE
    for way in WAYS:
        assert gap(read(adapter, texts, way, log_weights=[weights]), wanted) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weight_multiplies_what_memories_get(family: str) -> None:
    adapter, model = make_adapter(family, attention_weight=5.0), make_model(family)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    wanted = expect(adapter, texts, model, log_weights=[math.log(5), math.log(5) - 2.5])
    for way in (whole, token_by_token):
        assert gap(read(adapter, texts, way, log_weights=[[0.0, -2.5]]), wanted) < TOLERANCE
    assert gap(read(make_adapter(family), texts, log_weights=[[0.0, -2.5]]), wanted) > 100 * TOLERANCE


def test_log_weights_of_rows_are_their_own() -> None:
    adapter = make_adapter()
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    memories = parts(adapter, texts)
    context = context_of(adapter)
    session = adapter.session(3)
    session.read([memories, memories[1:], []], [[-1.0, 0.0], [-0.5], []])
    together = session.all_logits(context.repeat(3, 1))
    for row, (held, weights) in enumerate([(memories, [-1.0, 0.0]), (memories[1:], [-0.5]), ([], [])]):
        one = adapter.session(1)
        one.read([held], [weights])
        assert gap(one.all_logits(context[None])[0], together[row]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_attention_temperature_divides_the_logits_of_memories(family: str, temperature: float) -> None:
    adapter = make_adapter(family, attention_temperature=temperature)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (REFERENCE_TOKENS, 9)]
    sink = len(adapter.sink_ids)
    total = sink + REFERENCE_TOKENS + 9 + CONTEXT
    temperatures = torch.ones(total, total)
    temperatures[-CONTEXT:, sink:-CONTEXT] = temperature
    model = make_adapter(family).model
    model.set_attn_implementation("explicit")
    given, call = {"temperatures": temperatures}, model.forward
    model.forward = lambda *args, **kwargs: call(*args, **kwargs, **given)
    wanted = expect(adapter, texts, model)
    assert gap(wanted, expect(adapter, texts, make_model(family))) > 100 * TOLERANCE
    for way in [whole, token_by_token]:
        assert gap(read(adapter, texts, way), wanted) < TOLERANCE


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 6),
    extra=st.integers(0, 9),
    dim=st.sampled_from([1, 4, 16]),
    scale=st.floats(0.05, 2),
    softcap=st.none() | st.floats(0.5, 50),
    kind=st.sampled_from(["none", "added"]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_attend_is_softmax(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    extra: int,
    dim: int,
    scale: float,
    softcap: float | None,
    kind: str,
    with_sinks: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    heads, length = kv_heads * group, queries + extra
    query = torch.randn(batch, heads, queries, dim, generator=random) * 2
    key, value = torch.randn(2, batch, kv_heads, length, dim, generator=random)
    seen = torch.rand(batch, 1, queries, length, generator=random) < 0.6
    seen[..., 0] = True
    weights = torch.randn(batch, 1, 1, length, generator=random).masked_fill(~seen, -math.inf)
    mask = weights if kind == "added" else None
    sinks = torch.randn(heads, generator=random) * 3 if with_sinks else None
    got = attend(query, key, value, mask, Weighing(scale, softcap, sinks))
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                logits = key[b, h // group].double() @ query[b, h, q].double() * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if kind == "bool":
                    logits = logits.where(seen[b, 0, q], -math.inf)
                elif kind == "added":
                    logits += weights[b, 0, q]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1].double()])
                wanted = logits.softmax(0)[:length] @ value[b, h // group].double()
                assert torch.allclose(got[b, h, q].double(), wanted, atol=1e-5)


# -- other models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # positions are in the embeddings
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},  # ALiBi, attention of its own
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},  # attention of its own
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2},  # no attention
        "stablelm": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }.items(),
)
def test_models_that_cannot_read_memories_are_refused(kind: str, options: dict[str, Any]) -> None:
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=320, **options, **special)
    with pytest.raises(ConfigError, match="cannot read memories: ") as caught:
        make_adapter(model=AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [(4,), (0, 7)])
def test_layers_that_the_model_does_not_have_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"memory\.layers: the model has layers 0 to 3"):
        make_adapter(layers=layers)


# -- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.parametrize(("attention", "ways"), [("sdpa", [whole, chunked]), ("eager", [whole])])
def test_smollm2(smollm2_path: Path, attention: str, ways: list[Way]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    texts = [
        " The harbour lamp of Vell burns walnut oil and is painted purple. It was lit first in 1871.",
        " An abstract data type is known by its operations alone, whatever its representation.",
    ]
    question = tokenizer("\n\nQuestion: What colour is the lamp?\nAnswer: The lamp is purple", return_tensors="pt")
    context = question["input_ids"][0]
    tokens = len(tokenizer(texts[0])["input_ids"])
    with torch.no_grad():
        settings = MemoryConfig(reference_tokens=tokens)
        before = [tokenizer.bos_token_id, *tokenizer(settings.sink)["input_ids"]]
        ids = torch.tensor([[*before, *tokenizer(texts[0])["input_ids"], *context.tolist()]])
        plain = model(ids).logits[0, -len(context) :]
        references = [tokenizer(text)["input_ids"] for text in texts]
        beside = oracle(model, before, references, context.tolist(), offset=len(before) + tokens)
    adapter = TransformersAdapter(model, tokenizer, settings, "SmolLM2")
    for way in ways:
        for wanted, chosen in [(plain, texts[:1]), (beside, texts)]:
            session = adapter.session(1, context=4)
            session.read([parts(adapter, chosen)])
            assert gap(way(session, context), wanted) < TOLERANCE
