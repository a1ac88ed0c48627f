"""The parity law on a GPU: a memory gives the logits of its text, in float32 and in bfloat16."""

import copy
from typing import Any

import pytest
import torch

from m3model.transformers import MemoryModel, TransformersAdapter
from m3runtime.device.resolve import resolve
from tests.model.banks import make_runtime
from tests.model.families import REFERENCE_TOKENS, make_adapter, make_model, random_text
from tests.model.test_parity import (
    CONTEXT,
    TOLERANCE,
    WAYS,
    Way,
    context_of,
    gap,
    ids_of,
    parts,
    rms,
    token_by_token,
    whole,
)

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "qwen2-sliding", "gemma2"]


@pytest.fixture
def device() -> torch.device:
    return resolve("cuda")


@pytest.fixture(autouse=True)
def exact() -> Any:
    """Matrix products in float32, and not in TF32, whose ten bits would hide what the law is about."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: torch.device, family: str, dtype: torch.dtype = torch.float32) -> TransformersAdapter:
    return make_adapter(model=copy.deepcopy(make_model(family)).to(device=device, dtype=dtype))


def read(adapter: TransformersAdapter, way: Way) -> torch.Tensor:
    session = adapter.session(1, context=4)
    session.read([parts(adapter, [random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1)])])
    return way(session, context_of(adapter)).cpu()


def text_logits(adapter: TransformersAdapter, model: Any) -> torch.Tensor:
    """The stock model over sink, reference and context as one text; only right where no window hides anything."""
    text = ids_of(adapter, random_text(adapter.tokenizer, REFERENCE_TOKENS, seed=1))
    ids = torch.tensor([[*adapter.sink_ids, *text, *context_of(adapter).tolist()]], device=model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0, -CONTEXT:]
    return logits.float().cpu()


@pytest.mark.parametrize("way", WAYS)
def test_a_memory_gives_the_logits_of_its_text(device: torch.device, way: Way) -> None:
    adapter, model = on(device, "llama"), copy.deepcopy(make_model("llama")).to(device)
    assert gap(read(adapter, way), text_logits(adapter, model)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [whole, token_by_token])
def test_logits_are_those_of_the_cpu(device: torch.device, family: str, way: Way) -> None:
    """The CPU's are held to the law, windows and capped logits included, by tests/model/test_parity.py."""
    assert gap(read(on(device, family), way), read(make_adapter(family), way)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [whole, token_by_token])
def test_half_precision_keeps_the_law_to_its_rounding(device: torch.device, family: str, way: Way) -> None:
    """At most 1.5 times as far from the float32 logits as the same dtype is on the CPU, in root mean square."""
    right = read(make_adapter(family), way)
    rounded = rms(read(on(torch.device("cpu"), family, torch.bfloat16), way), right)
    assert rms(read(on(device, family, torch.bfloat16), way), right) < 1.5 * rounded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", ["all", 3])
def test_memories_are_encoded_on_the_device(device: torch.device, family: str, tokens: Any) -> None:
    model = copy.deepcopy(make_model(family)).to(device)
    adapter = make_adapter(model=model, tokens_per_head=tokens)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (5, REFERENCE_TOKENS, 1)]
    memories, wanted = adapter.encode(texts), make_adapter(family, tokens_per_head=tokens).encode(texts)
    assert adapter.device == memories.keys.device == memories.values.device == device
    assert memories.tokens.tolist() == wanted.tokens.tolist()
    for row, count in enumerate(wanted.tokens.tolist()):
        for mine, other in [(memories.keys, wanted.keys), (memories.values, wanted.values)]:
            assert gap(mine[row, :, :, :count].cpu(), other[row, :, :, :count]) < TOLERANCE


def test_a_device_answers_as_the_cpu(device: torch.device, tmp_path: Any) -> None:
    """Greedily, over a bank: recall, leases and attention on the device."""
    texts = [random_text(make_adapter().tokenizer, 20, seed=seed) for seed in range(6)]
    answers = []
    for number, place in enumerate((torch.device("cpu"), device)):
        adapter = on(place, "llama")
        with make_runtime(adapter, tmp_path / str(number), texts) as runtime:
            answer = MemoryModel(adapter, runtime).generate(texts[0], prompt="plain", max_new_tokens=24)
            answers.append((answer.tokens, sorted(answer.memories)))
    assert answers[0] == answers[1]
    assert answers[0][1]
