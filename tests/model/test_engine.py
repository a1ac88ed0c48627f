"""The engine on tiny models: the laws of every engine, and what is this one's own."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from m3model.engine.buffers import rounded
from m3model.engine.engine import MemoryEngine
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Request, answers
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import InputError
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from m3runtime.testing.engine import Crowd, EngineContract
from tests.model.banks import CHUNK, make_runtime
from tests.model.families import make_adapter, random_text


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


class Engines(EngineContract):
    """Engines of one tiny family."""

    family = "llama"

    @pytest.fixture(autouse=True)
    def open(self, tmp_path: Path) -> Iterator[None]:
        self.adapter = make_adapter(self.family)
        texts = [random_text(self.adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
        with ExitStack() as closing:
            self.runtime = closing.enter_context(make_runtime(self.adapter, tmp_path / "bank", texts))
            self.streams = closing
            yield

    def make_engine(self, *, rows: int = 4, crowded: bool = False) -> MemoryEngine:
        adapter = make_adapter(model=self.adapter.model)
        adapter.rows = rows
        if crowded:  # for one long request, or for two short ones
            longest = max(len(adapter.ids(request.prompt.text)) for request in self.make_requests()) + 3 * CHUNK + 1
            adapter.room = self.buffers_of(adapter).bytes_of(1, rounded(64), rounded(longest))
        engine = adapter.engine
        assert isinstance(engine, MemoryEngine)
        return engine

    def buffers_of(self, adapter: TransformersAdapter) -> Any:
        probe = make_adapter(model=adapter.model).engine
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
            Request(prompt(5), asks(), self.stream()),
            Request(prompt(3 * CHUNK + 1), asks(log_probs=3), self.stream()),
            Request(Prompt(prompt(2 * CHUNK).text, query="a map, a bell and a heron"), asks(**drawn), self.stream()),
            Request(prompt(CHUNK), asks(max_new_tokens=3 * CHUNK), None),
            Request(prompt(70), asks(**drawn, top_p=0.8, repetition_penalty=1.3, log_probs=0), None),
            Request(prompt(2), asks(frequency_penalty=1.5, presence_penalty=0.5, max_new_tokens=1), self.stream()),
        ]

    def make_failing_request(self) -> Request:
        stream = Stream(FailingRuntime(self.runtime), self.adapter.dtype)
        return Request(Prompt(random_text(self.adapter.tokenizer, 9, seed=1)), GenerateConfig(), stream)


class TestMistralSliding(Engines):
    family = "mistral-sliding"
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

    def test_the_interpreter_waits_for_its_threads(self) -> None:
        """A thread that is stopped within a step takes the process with it."""
        daemons: list[bool] = []
        answers(engine := self.make_engine(), self.make_requests())
        tickets = engine.submit(self.make_requests(), lambda *_: daemons.append(threading.current_thread().daemon))
        engine.close()
        assert tickets
        assert not any(daemons)

    def test_tokens_that_the_model_does_not_have_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"generate\.logit_bias: 99999 is no token"):
            self.adapter.generate([Prompt("oil")], None, GenerateConfig(logit_bias={99_999: 1.0}))


def test_a_request_that_can_never_fit_is_refused_by_the_key() -> None:
    adapter = make_adapter()
    adapter.room = 100_000
    with pytest.raises(InputError, match=r"model\.room: 100000 bytes do not hold"):
        adapter.generate([Prompt("walnut oil")], None, GenerateConfig(max_new_tokens=100_000))
