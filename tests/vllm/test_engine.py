"""vLLM behind our contract of engines; and the server over it."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from m3model.vllm.adapter import VllmAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Request
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.errors import ConfigError
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream
from tests.model.test_engine import FailingRuntime, LateRuntime
from tests.serve.serving import running
from tests.vllm.both import OPTIONS
from tests.vllm.contract import VllmContract, with_short_chunks

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="session")
def config(config: Config) -> Config:
    return with_short_chunks(config)


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[VllmAdapter]:
    served = VllmAdapter(runtime, OPTIONS)
    served.check(runtime.bank.manifest, runtime.bank.path)
    yield served
    served.close()


class TestVllm(VllmContract):
    examples: ClassVar[int] = 3

    def make_failing_request(self) -> Request:
        stream = Stream(FailingRuntime(self.runtime), self.served.dtype)
        return Request(Prompt("The harbour lamp"), GenerateConfig(), stream)

    def make_late_request(self, gate: threading.Event) -> Request:
        return replace(self.make_failing_request(), stream=Stream(LateRuntime(self.runtime, gate), self.served.dtype))

    def test_it_writes_no_memories(self) -> None:
        with pytest.raises(ConfigError, match="writes no memories"):
            self.served.encode(["a"])


def test_the_server_answers_and_cites_over_vllm(served: VllmAdapter, runtime: Runtime) -> None:
    limits = runtime.config.serve.model_copy(update={"port": 0, "name": "lamp"})
    runtime.config = runtime.config.model_copy(update={"serve": limits})
    engine = served.engine
    with running(runtime, served) as serving:  # type: ignore[arg-type] # any adapter
        client = serving.openai()
        asked: Any = [{"role": "user", "content": "What does the harbour lamp burn?"}]
        whole = client.chat.completions.create(model="lamp", messages=asked, max_tokens=20)
        assert whole.choices[0].message.content
        [first, *_] = whole.choices[0].message.memories  # type: ignore[attr-defined]
        assert first["source"].endswith("handbook.md")
        parts = client.chat.completions.create(model="lamp", messages=asked, max_tokens=70, stream=True)
        cited = [one for part in parts for one in getattr(part.choices[0].delta, "memories", None) or ()]
        assert first["id"] in [one["id"] for one in cited]
    assert engine._closed  # type: ignore[attr-defined]
