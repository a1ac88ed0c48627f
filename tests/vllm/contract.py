"""`VllmContract`: the contract of engines for vLLM, in this process and at a URL."""

from typing import Any

import pytest

from m3model.adapter import TransformersAdapter
from m3model.vllm.engine import VllmEngine
from m3model.vllm.front import FrontAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Engine, Request, answers
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.errors import InputError
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from m3runtime.testing.engine import EngineContract

CHUNK = 8


def with_short_chunks(config: Config) -> Config:
    """Short answers have several then."""
    recall = config.recall.model_copy(update={"chunk_tokens": CHUNK, "lookahead_tokens": 3})
    return config.model_copy(update={"recall": recall})


class VllmContract(EngineContract):
    """Subclasses have a fixture ``served``. There is one vLLM, so all engines of a test are on one core."""

    @pytest.fixture(autouse=True)
    def open(self, served: FrontAdapter, runtime: Runtime) -> None:
        self.served, self.runtime = served, runtime

    def make_engine(self, *, rows: int = 4, crowded: bool = False) -> Engine:
        whole = self.served.engine
        assert isinstance(whole, VllmEngine)
        return VllmEngine(whole._core, whole._words, length=whole._length, vocabulary=whole._vocabulary, owns=False)

    def stream(self) -> Stream:
        return self.runtime.stream(self.served.dtype)

    def make_requests(self) -> list[Request]:
        def asks(**options: Any) -> GenerateConfig:
            return GenerateConfig(**{"max_new_tokens": 20, **options})

        drawn = {"temperature": 0.9, "seed": 5}
        long = Prompt("The town has a harbour, a gate, a market hall, and a wall that quarrymen built. " * 6)
        return [
            Request(self.served.render("What does the harbour lamp burn?", "question"), asks(), self.stream()),
            Request(long, asks(log_probs=3, max_new_tokens=70), self.stream()),
            Request(Prompt("Once upon a time", query="the bell of the town"), asks(**drawn), self.stream()),
            Request(Prompt("The capital of France"), asks(max_new_tokens=30), None),
            Request(Prompt("A list of birds:"), asks(**drawn, top_p=0.8, repetition_penalty=1.3, log_probs=0), None),
            Request(Prompt("Bees"), asks(frequency_penalty=1.5, presence_penalty=0.5, max_new_tokens=1), self.stream()),
        ]

    def test_an_answer_is_that_of_our_own_engine(self, adapter: TransformersAdapter) -> None:
        questions = [
            "What does the harbour lamp burn?",
            "Which colour has the town's gate?",
            "When is the market held?",
        ]
        settings = GenerateConfig(max_new_tokens=80, stop=("\n\n",), log_probs=2)

        def requests() -> list[Request]:
            return [Request(self.served.render(text, "question"), settings, self.stream()) for text in questions]

        asked = requests()
        for request, ours, theirs in zip(
            asked, answers(adapter.engine, asked), answers(self.served.engine, requests()), strict=True
        ):
            assert (theirs.text, theirs.tokens, theirs.stopped_by) == (ours.text, ours.tokens, ours.stopped_by)
            more = (self.served.count_prompt(request.prompt, memories=True) - 1) // CHUNK  # recalls of the prompt
            assert [chunk.ids for chunk in theirs.chunks] == [chunk.ids for chunk in ours.chunks[more:]]
            for own, other in zip(ours.log_probs, theirs.log_probs, strict=True):
                assert other.token == own.token
                assert [token for token, _ in other.likeliest] == [token for token, _ in own.likeliest]

    def test_what_does_not_fit_is_refused_before_it_begins(self) -> None:
        with pytest.raises(InputError, match="max_model_len, 672 are for memories"):
            self.served.engine.submit(
                [Request(Prompt("a"), GenerateConfig(max_new_tokens=1900), self.stream())], lambda *_: None
            )

    def test_what_attention_read_is_not_told(self) -> None:
        with pytest.raises(InputError, match=r"generate\.grounding"):
            answers(self.served.engine, [Request(Prompt("Bees"), GenerateConfig(grounding=True), self.stream())])
