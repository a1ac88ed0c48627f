"""What a step of decoding asks of the device: no copy of what is there already, and nobody waits for it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m3model.engine.session import Session
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig
from m3runtime.retrieval.query import Query
from m3runtime.runtime import Runtime
from tests.model.banks import CHUNK, make_runtime
from tests.model.families import make_adapter, make_model, make_tokenizer, random_text

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select", "unique_dim"}
"""Operations that cannot be queued: their result, or its shape, depends on values on the device."""

PRODUCTS = {"linear", "mm", "addmm", "mkldnn::_linear_pointwise"}
"""Operations of linear layers."""


class Operations(TorchDispatchMode):
    """Counts operations, and notes the most elements that one of them wrote to a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").split(".")[0]
        self.names[name] += 1
        result = function(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.layout is torch.strided]  # not packed
        given = {arg.untyped_storage().data_ptr() for arg in tensors}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.shapes.append(tuple(result.shape))
        return result


def ready(adapter: TransformersAdapter, counts: Sequence[int], weights: Sequence[float]) -> Session:
    """Two sequences with memories of their own that have read prompts."""
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (20, 11)]
    encoded = adapter.encode(texts)
    parts = [(encoded.keys[i, :, :, :n], encoded.values[i, :, :, :n]) for i, n in enumerate(encoded.tokens.tolist())]
    session = adapter.session(2)
    session.read([[parts[0]], [parts[0], parts[1]]], [weights[:1], weights])
    session.forward(torch.arange(2 * max(counts)).reshape(2, -1) + 10, counts)
    return session


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("counts", [[9, 9], [3, 9]])
def test_nothing_is_waited_for_and_nothing_kept_is_copied(family: str, counts: list[int]) -> None:
    adapter = make_adapter(family)
    session = ready(adapter, counts, [-0.5, 0.0])
    token = torch.tensor([[7], [8]])
    for _ in range(3):
        with Operations() as step:
            token = session.forward(token).argmax(-1)[:, None]
        assert not WAITING & step.names.keys()
        assert not PRODUCTS.isdisjoint(step.names)  # the step was seen at all
        # No copy of the keys of a layer, whose columns are those of memories, sink and context.
        columns = session.cache.used + session.cache.sink_tokens + session.cache.columns
        kept = 2 * adapter.layout.kv_heads * columns * adapter.layout.head_dim
        assert [shape for shape in step.shapes if torch.Size(shape).numel() == kept] == []


def test_the_check_sees_copies_and_waiting() -> None:
    with Operations() as seen:
        copy = torch.ones(2, 3, 4).clone()
        bool((copy == 1).all())
    assert WAITING & seen.names.keys()
    assert (2, 3, 4) in seen.shapes


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("counts", [[9, 9], [3, 9]])
def test_a_gpu_is_not_waited_for(counts: list[int]) -> None:
    adapter = make_adapter(model=make_model("llama").to("cuda"))
    session = ready(adapter, counts, [-0.5, 0.0])
    token = torch.tensor([[7], [8]], device="cuda")
    token = session.forward(token).argmax(-1)[:, None]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            token = session.forward(token).argmax(-1)[:, None]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert token.shape == (2, 1)


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime_of(tmp_path: Path) -> Iterator[Callable[..., Runtime]]:
    with ExitStack() as closing:

        def opened(adapter: TransformersAdapter, **options: Any) -> Runtime:
            texts = [random_text(adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
            return closing.enter_context(make_runtime(adapter, tmp_path / "bank", texts, **options))

        yield opened


def events_of(
    adapter: TransformersAdapter, runtime: Runtime, prompts: Sequence[Prompt], answered: int = 1
) -> list[Any]:
    """What happens while prompts are read: texts recalled by and hinted at, tokens that the head is asked for."""
    events: list[Any] = []
    recall, hint = Runtime.recall, Runtime.hint

    def recalling(self: Runtime, streams: Any, texts: Sequence[str], **options: Any) -> Any:
        events.append(("recall", *texts))
        return recall(self, streams, texts, **options)

    def hinting(self: Runtime, streams: Any, texts: Sequence[str]) -> None:
        events.append(("hint", *texts))
        hint(self, streams, texts)

    def heading(_: Any, inputs: tuple[torch.Tensor]) -> None:
        events.append(("head", inputs[0].shape[1]))

    with ExitStack() as closing:
        closing.enter_context(patch.object(Runtime, "recall", recalling))
        closing.enter_context(patch.object(Runtime, "hint", hinting))
        closing.callback(adapter.model.lm_head.register_forward_pre_hook(heading).remove)
        streams = [closing.enter_context(runtime.stream(adapter.dtype)) for _ in prompts]
        adapter.generate(prompts, streams, GenerateConfig(max_new_tokens=answered))
    return events


def chunks(adapter: TransformersAdapter, prompt: Prompt) -> list[str]:
    ids = adapter.ids(prompt.text)
    return [adapter.tokenizer.decode(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]


def test_while_a_chunk_of_a_prompt_is_read_the_next_one_is_looked_up(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter()
    runtime = runtime_of(adapter)
    long, short, asked = (
        Prompt(random_text(adapter.tokenizer, 2 * CHUNK + 3, seed=1)),
        Prompt(random_text(adapter.tokenizer, CHUNK, seed=2)),
        Prompt(random_text(adapter.tokenizer, 2 * CHUNK, seed=3), query="a map, a bell and a heron"),
    )
    one, two, three = chunks(adapter, long)
    (only,) = chunks(adapter, short)
    assert events_of(adapter, runtime, [long, short, asked]) == [
        ("recall", one, only, asked.query),
        ("hint", two),  # and none for a query that stays, or a prompt that is at its end
        ("head", 1),
        ("recall", two, asked.query),
        ("hint", three),
        ("head", 1),
        ("recall", three),
        ("head", 1),
    ]


def test_without_lookahead_nothing_is_looked_up_early(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter()
    runtime = runtime_of(adapter, lookahead_tokens=0)
    prompt = Prompt(random_text(adapter.tokenizer, 2 * CHUNK, seed=1))
    one, two = chunks(adapter, prompt)
    # And the head, much of a small model, is asked for nothing but a prompt's last token.
    assert events_of(adapter, runtime, [prompt]) == [("recall", one), ("head", 0), ("recall", two), ("head", 1)]


@pytest.mark.parametrize("choose_early", [False, True])
def test_what_is_chosen_early_is_what_was_looked_up(runtime_of: Callable[..., Runtime], choose_early: bool) -> None:
    adapter = make_adapter()
    runtime = runtime_of(adapter, choose_early=choose_early)
    prompt = Prompt(random_text(adapter.tokenizer, CHUNK, seed=1))
    events = events_of(adapter, runtime, [prompt], answered=3 * CHUNK + 1)
    _, *of_answer = [event for event in events if event[0] != "head"]
    assert [kind for kind, _ in of_answer] == ["hint", "recall"] * 3
    texts = [text for _, text in of_answer]
    for hinted, recalled in zip(texts[::2], texts[1::2], strict=True):
        assert (recalled == hinted) is choose_early
        assert recalled.startswith(hinted)
    lookahead = runtime.metrics().lookahead
    assert not choose_early or lookahead.hits == lookahead.guesses


def test_the_head_is_asked_for_the_ends_of_prompts(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter()
    runtime = runtime_of(adapter, min_score=1)
    prompts = [Prompt(random_text(adapter.tokenizer, length, seed=length)) for length in (3, CHUNK + 2, CHUNK + 5)]
    heads = [event[1] for event in events_of(adapter, runtime, prompts) if event[0] == "head"]
    assert heads == [1, 2]  # in the first chunk after token 3, in the second after 2 and 5


def test_a_message_is_searched_by_together_with_the_earlier_ones(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter()
    said = [("user", "a map"), ("assistant", "a bell"), ("user", "a heron"), ("assistant", "no"), ("user", "where")]
    prompt = adapter.chat([{"role": role, "content": content} for role, content in said])
    assert (prompt.query, prompt.context) == ("where", ("a heron", "a map"))
    with_turns = runtime_of(adapter, turn_weight=0.7)
    asked = {event[1] for event in events_of(adapter, with_turns, [prompt]) if event[0] == "recall"}
    assert asked == {Query("where", ("a heron", "a map"), turn_weight=0.7)}


def test_an_answer_is_searched_by_together_with_its_question(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter(tokenizer=make_tokenizer(eos=False))
    runtime = runtime_of(adapter, question_weight=0.5)
    prompt = Prompt("a map and a bell", query="a map")
    with runtime.stream(adapter.dtype) as stream, patch.object(runtime, "recall", wraps=runtime.recall) as recall:
        adapter.generate([prompt], [stream], GenerateConfig(max_new_tokens=CHUNK + 1))
    first, second = (call.args[1][0] for call in recall.call_args_list)
    assert first == "a map"
    assert (second.context, second.weights) == (("a map",), (0.5,))


def test_a_reranker_judges_an_answer_by_its_question(runtime_of: Callable[..., Runtime]) -> None:
    adapter = make_adapter(tokenizer=make_tokenizer(eos=False))
    runtime = runtime_of(adapter, reranker={"path": "given"}, turn_weight=0.7)
    prompt = Prompt("a map and a bell", query="where", context=("a heron", "a map"))
    with runtime.stream(adapter.dtype) as stream, patch.object(runtime, "recall", wraps=runtime.recall) as recall:
        adapter.generate([prompt], [stream], GenerateConfig(max_new_tokens=CHUNK + 1))
    first, second = (call.args[1][0] for call in recall.call_args_list)
    assert first.question == second.question == "a map\na heron\nwhere"
    assert (second.context, second.weights) == ((), ())
    assert second.text != first.text
