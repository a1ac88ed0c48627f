"""The engine on tiny models: the laws of every engine, and what is this one's own."""

import copy
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from m3model.engine.buffers import RowBuffers, rounded
from m3model.engine.engine import MemoryEngine
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Event, Failure, Piece, Request, answers
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import ConfigError, InputError
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from m3runtime.testing.engine import Crowd, EngineContract
from tests.model.banks import CHUNK, make_runtime
from tests.model.families import BUDGETS, make_adapter, make_model, random_text


class FailingRuntime:
    """A recaller whose recalls raise."""

    def __init__(self, runtime: Runtime) -> None:
        self.config = runtime.config

    def recall(self, *_: object, **__: object) -> Any:
        raise InputError("nothing is remembered here")

    def hint(self, *_: object) -> None:
        """Nothing to look up."""

    def release(self, _: Stream) -> None:
        """Nothing is held."""


class LateRuntime(FailingRuntime):
    """A recaller that waits for its gate."""

    def __init__(self, runtime: Runtime, gate: threading.Event) -> None:
        super().__init__(runtime)
        self.gate = gate

    def recall(self, *_: object, **__: object) -> Any:
        assert self.gate.wait(60)
        raise InputError("nothing is remembered here")


class Engines(EngineContract):
    """Engines of one tiny family."""

    family = "llama"
    memory: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def open(self, tmp_path: Path) -> Iterator[None]:
        self.adapter = make_adapter(self.family, **self.memory)
        texts = [random_text(self.adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
        with ExitStack() as closing:
            self.runtime = closing.enter_context(make_runtime(self.adapter, tmp_path / "bank", texts))
            self.streams = closing
            yield

    def make_engine(self, *, rows: int = 4, crowded: bool = False) -> MemoryEngine:
        adapter = make_adapter(model=self.adapter.model, **self.memory)
        adapter.rows = rows
        if crowded:  # for one long request, or for two short ones
            longest = max(len(adapter.ids(request.prompt.text)) for request in self.make_requests()) + 3 * CHUNK + 1
            adapter.room = self.buffers_of(adapter).bytes_of(1, rounded(64), rounded(longest))
        engine = adapter.engine
        assert isinstance(engine, MemoryEngine)
        return engine

    def buffers_of(self, adapter: TransformersAdapter) -> Any:
        probe = make_adapter(model=adapter.model, **self.memory).engine
        assert isinstance(probe, MemoryEngine)
        return probe._buffers

    def stream(self) -> Stream:
        return self.streams.enter_context(self.runtime.stream(self.adapter.dtype))

    def make_requests(self) -> list[Request]:
        def prompt(tokens: int) -> Prompt:
            return Prompt(random_text(self.adapter.tokenizer, tokens, seed=100 + tokens))

        def asks(**options: Any) -> GenerateConfig:
            return GenerateConfig(**{"max_new_tokens": 2 * CHUNK + 3, **options})

        drawn = {"temperature": 0.9, "seed": 5}
        return [
            Request(prompt(5), asks(grounding=True), self.stream()),
            Request(prompt(3 * CHUNK + 1), asks(log_probs=3), self.stream(), recall_every=2),
            Request(Prompt(prompt(2 * CHUNK).text, query="a map, a bell and a heron"), asks(**drawn), self.stream()),
            Request(prompt(CHUNK), asks(max_new_tokens=3 * CHUNK), None),
            Request(prompt(70), asks(**drawn, top_p=0.8, repetition_penalty=1.3, log_probs=0), None),
            Request(prompt(2), asks(frequency_penalty=1.5, max_new_tokens=1, grounding=True), self.stream()),
        ]

    def make_failing_request(self) -> Request:
        stream = Stream(FailingRuntime(self.runtime), self.adapter.dtype)
        return Request(Prompt(random_text(self.adapter.tokenizer, 9, seed=1)), GenerateConfig(), stream)

    def make_late_request(self, gate: threading.Event) -> Request:
        return replace(self.make_failing_request(), stream=Stream(LateRuntime(self.runtime, gate), self.adapter.dtype))


class TestMistralSliding(Engines):
    family = "mistral-sliding"
    examples = 4


class TestBudgets(Engines):
    memory: ClassVar[dict[str, Any]] = {"tokens_per_head": BUDGETS}
    examples = 4


class TestGemma3(Engines):
    family = "gemma3_text"
    examples = 4


class TestLlama(Engines):
    """The contract, and what is this engine's own."""

    def test_who_loses_its_row_goes_on_as_if_nothing_had_happened(self) -> None:
        def requests() -> list[Request]:
            settings = GenerateConfig(max_new_tokens=70, temperature=0.8, seed=3, presence_penalty=0.4)
            prompts = [Prompt(random_text(self.adapter.tokenizer, 20, seed=seed)) for seed in (1, 2)]
            return [Request(prompt, settings, self.stream()) for prompt in prompts]

        alone = [answers(self.make_engine(), [request])[0] for request in requests()]
        adapter = make_adapter(model=self.adapter.model)
        adapter.room = self.buffers_of(adapter).bytes_of(2, rounded(64), 64)
        engine = adapter.engine
        assert isinstance(engine, MemoryEngine)
        together = answers(engine, requests())
        assert engine.preempted > 0
        for one, other in zip(together, alone, strict=True):
            assert one.tokens == other.tokens
            assert [chunk.ids for chunk in one.chunks] == [chunk.ids for chunk in other.chunks]

    def test_a_model_that_fails_ends_who_is_under_way_and_nobody_else(self) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        expected = self.alone()
        fails = iter([False, False, True])

        def fail(*_: object) -> None:
            if next(fails, False):
                raise RuntimeError("the device fell off")

        hook = engine._runner._step.model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="fell off"):
            answers(engine, requests)
        hook.remove()
        self.check(Crowd(engine, self.make_requests(), [0] * len(requests), [None] * len(requests)).seen, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_numbers_that_overflow_end_one_request(self, dtype: torch.dtype) -> None:
        """And no later one that gets its row, whose hidden columns would be no numbers."""
        model = copy.deepcopy(self.adapter.model).to(dtype)
        adapter = make_adapter(model=model)
        prompts = [Prompt(random_text(adapter.tokenizer, length, seed=length)) for length in (40, 5)]
        strange = adapter.ids(prompts[0].text)[30]
        assert strange not in adapter.ids(prompts[1].text)
        settings = GenerateConfig(max_new_tokens=6)
        [expected] = adapter.generate(prompts[1:], None, settings)
        adapter.engine._runner._step.model.get_input_embeddings().weight.data[strange] = torch.nan  # type: ignore[attr-defined]
        adapter.engine._runner._step.model.lm_head.weight.data.nan_to_num_()  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"model\.dtype: .* overflow"):
            adapter.generate(prompts[:1], None, settings)
        assert adapter.generate(prompts[1:], None, settings)[0].tokens == expected.tokens

    def test_the_interpreter_waits_for_its_threads(self) -> None:
        """A thread that is stopped within a step takes the process with it."""
        daemons: list[bool] = []
        answers(engine := self.make_engine(), self.make_requests())
        tickets = engine.submit(self.make_requests(), lambda *_: daemons.append(threading.current_thread().daemon))
        engine.close()
        assert tickets
        assert not any(daemons)

    def test_a_recall_that_cannot_be_read_ends_all_and_leaves_nobody_waiting(self, monkeypatch: Any) -> None:
        engine, requests = self.make_engine(rows=8), self.make_requests()
        expected = self.alone()
        put = engine._buffers.put_memories
        fails = iter([False, False, True])

        def fail(*args: Any) -> Any:
            if next(fails, False):
                raise RuntimeError("no memory left")
            return put(*args)

        monkeypatch.setattr(engine._buffers, "put_memories", fail)
        crowd = Crowd(engine, requests, [0] * len(requests), [None] * len(requests))
        assert any(isinstance(seen.last, Failure) for seen in crowd.seen)
        self.check(Crowd(engine, self.make_requests(), [0] * len(requests), [None] * len(requests)).seen, expected)
        engine.close()

    @pytest.mark.parametrize("broken", ["prepare", "torch.get_num_threads", "Asking"])
    def test_a_recall_that_cannot_begin_ends_its_request(self, broken: str, monkeypatch: Any) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        expected = self.alone()
        begun = threading.Event()

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("cannot begin")

        def hear(_: int, event: Event) -> None:
            if isinstance(event, Piece) and not begun.is_set():
                begun.set()
                monkeypatch.setattr(f"m3model.engine.recaller.{broken}", fail)

        engine.submit([replace(requests[3], settings=GenerateConfig(max_new_tokens=400))], hear)
        assert begun.wait(60)
        with pytest.raises(RuntimeError, match="cannot begin"):
            answers(engine, requests[:1])
        monkeypatch.undo()
        self.check(Crowd(engine, self.make_requests(), [0] * 6, [None] * 6).seen, expected)
        engine.close()

    def test_buffers_that_could_not_grow_are_made_anew(self, monkeypatch: Any) -> None:
        engine, requests = self.make_engine(), self.make_requests()
        expected = self.alone()
        answers(engine, requests[:1])
        zeros, count = torch.zeros, iter(range(99))

        def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
            if len(args[0]) == 5 and next(count) == 1:  # the values', after the keys'
                raise RuntimeError("out of memory")
            return zeros(*args, **kwargs)

        monkeypatch.setattr("m3model.engine.buffers.torch.zeros", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            answers(engine, [replace(requests[1], settings=GenerateConfig(max_new_tokens=300))])
        assert answers(engine, requests[4:5])[0].tokens == expected[4].tokens
        engine.close()

    def test_rows_and_contexts_together_stay_within_the_room(self) -> None:
        """One long request and then many short ones have no more than either needs."""
        adapter = make_adapter(model=self.adapter.model)
        expected = self.alone()
        adapter.room = self.buffers_of(adapter).bytes_of(1, 64, 448)
        engine = adapter.engine
        assert isinstance(engine, MemoryEngine)
        long = [Request(Prompt("oil"), GenerateConfig(max_new_tokens=400), stream) for stream in (None, self.stream())]
        for requests in (long[1:], self.make_requests(), long[:1], self.make_requests()):
            found = answers(engine, requests)
            if len(requests) > 1:
                assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
            buffers = engine._buffers
            assert buffers.bytes_of(buffers.rows, buffers.region, buffers.context) <= adapter.room
        engine.close()
        assert buffers.stacks[0].keys.numel() == 0

    def test_settings_beyond_what_the_device_counts_with(self) -> None:
        request = self.make_requests()[0]
        greedy, *others = (
            answers(self.make_engine(), [replace(request, settings=settings, stream=self.stream())])[0].tokens
            for settings in (
                GenerateConfig(max_new_tokens=9),
                GenerateConfig(max_new_tokens=9, temperature=1e-40),
                GenerateConfig(max_new_tokens=9, top_k=10**30),
            )
        )
        assert others == [greedy, greedy]

    @pytest.mark.parametrize("reads", [True, False])
    def test_positions_begin_after_the_memories_or_at_zero(self, reads: bool) -> None:
        engine, seen = self.make_engine(), list[int]()
        model = engine._runner._step.model
        note = model.register_forward_pre_hook(
            lambda _, __, given: seen.extend(given["position_ids"][0].tolist()), with_kwargs=True
        )
        request = Request(Prompt("oil"), GenerateConfig(max_new_tokens=4), self.stream() if reads else None)
        answers(engine, [request])
        note.remove()
        first = self.adapter.offset if reads else 0
        assert seen == list(range(first, first + len(seen)))

    @pytest.mark.parametrize("more", [16, -8])
    def test_a_head_that_is_not_as_wide_as_the_vocabulary(self, more: int) -> None:
        model = copy.deepcopy(make_model("llama"))
        old = model.lm_head.weight.detach()
        model.lm_head = torch.nn.Linear(old.shape[1], len(old) + more, bias=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()[: len(old)] = old[: len(model.lm_head.weight)]
        adapter = make_adapter(model=model)
        settings = GenerateConfig(max_new_tokens=4, presence_penalty=0.1, logit_bias={3: 50.0})
        assert adapter.generate([Prompt("oil")], None, settings)[0].tokens == (3, 3, 3, 3)

    def test_a_forked_process_ends_its_copy(self) -> None:
        engine = self.make_engine()
        [ticket] = engine.submit(self.make_requests()[:1], lambda *_: None)
        with engine._changed:  # as the engine's thread may hold it at any moment
            child = os.fork()
            if not child:
                thread = threading.Thread(target=lambda: (ticket.cancel(), engine.close()))
                thread.start()
                thread.join(20)
                os._exit(thread.is_alive())
        assert os.waitpid(child, 0)[1] == 0
        engine.close()

    def test_tokens_that_the_model_does_not_have_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"generate\.logit_bias: 99999 is no token"):
            self.adapter.generate([Prompt("oil")], None, GenerateConfig(logit_bias={99_999: 1.0}))


def test_a_request_that_can_never_fit_is_refused_by_the_key() -> None:
    adapter = make_adapter()
    adapter.room = 100_000
    with pytest.raises(InputError, match=r"model\.room: 100000 bytes do not hold"):
        adapter.generate([Prompt("walnut oil")], None, GenerateConfig(max_new_tokens=100_000))


def test_threads_that_ask_at_once_get_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made, slow = [], RowBuffers.__init__

    def init(self: RowBuffers, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        time.sleep(0.01)  # so that others come meanwhile
        slow(self, *args, **kwargs)

    monkeypatch.setattr(RowBuffers, "__init__", init)
    adapter = make_adapter()
    with ThreadPoolExecutor(8) as threads:
        engines = set(threads.map(lambda _: adapter.engine, range(8)))
    assert len(engines) == len(made) == 1
    adapter.close()
