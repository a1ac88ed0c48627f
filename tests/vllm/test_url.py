"""`m3 serve` in front of a vLLM server that has our connector: the contract of engines, citations, and what breaks."""

import queue
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import pytest
from openai import APIStatusError, BadRequestError, OpenAIError

from m3model.remote.adapter import RemoteAdapter
from m3model.remote.server import KEY as VARIABLE
from m3model.vllm.front import FrontAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import Event, Failure, Piece, Request
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.errors import ConfigError, RemoteError
from m3runtime.retrieval.restriction import Restriction
from m3runtime.runtime import Runtime
from tests.serve.serving import Serving, running
from tests.vllm.contract import VllmContract, with_short_chunks
from tests.vllm.plain import KEY, Plain, plain_server

pytestmark = pytest.mark.vllm

ASKED: Any = [{"role": "user", "content": "What does the harbour lamp burn?"}]


@pytest.fixture(scope="session")
def config(config: Config) -> Config:
    serve = config.serve.model_copy(update={"port": 0, "name": "lamp"})
    return with_short_chunks(config).model_copy(update={"serve": serve})


@pytest.fixture(scope="module", autouse=True)
def plain(config: Config, adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    with plain_server(config, tmp_path_factory.mktemp("plain")) as plain, pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        yield plain


@pytest.fixture(scope="module")
def served(runtime: Runtime, plain: Plain) -> Iterator[FrontAdapter]:
    served = RemoteAdapter.over(runtime, runtime.device, {"url": plain.url.removesuffix("/v1")})
    served.check(runtime.bank.manifest, runtime.bank.path)
    yield served
    served.close()


class TestAtUrl(VllmContract):
    examples: ClassVar[int] = 1
    test_a_recall_stops_nobody_who_comes_later = None  # its recalls are the server's

    def make_failing_request(self) -> Request:
        stream = self.runtime.stream(self.served.dtype, Restriction(min_score=7.0))  # the server refuses it
        return Request(Prompt("The harbour lamp"), GenerateConfig(), stream)


@pytest.fixture
def serving(runtime: Runtime, plain: Plain) -> Iterator[Serving]:
    served = RemoteAdapter(runtime, plain.url)
    with running(runtime, served) as serving:  # type: ignore[arg-type] # any adapter
        yield serving


def test_the_front_door_answers_and_cites(serving: Serving) -> None:
    client = serving.openai()
    whole = client.chat.completions.create(model="lamp", messages=ASKED, max_tokens=40, temperature=0)
    memories = whole.choices[0].message.memories  # type: ignore[attr-defined]
    assert memories[0]["source"].endswith("handbook.md")
    assert len({one["start_index"] for one in memories}) > 2  # chunks are short
    assert whole.choices[0].message.annotations
    parts = list(
        client.chat.completions.create(model="lamp", messages=ASKED, max_tokens=40, temperature=0, stream=True)
    )
    text, told = "", []
    for part in parts:
        delta = part.choices[0].delta
        told += [(one["id"], len(text)) for one in getattr(delta, "memories", None) or ()]
        text += delta.content or ""
    assert text == whole.choices[0].message.content
    assert told == [(one["id"], one["start_index"]) for one in memories]


def test_what_may_be_read_is_said_to_the_server(serving: Serving) -> None:
    client = serving.openai()

    def read(**memory: Any) -> list[Any]:
        found: Any = client.chat.completions.create(
            model="lamp", messages=ASKED, max_tokens=20, extra_body={"memory": memory}
        )
        return list(found.choices[0].message.memories)

    assert read(sources=["of nobody.md"]) == []
    assert read(off=True) == []
    assert {one["start_index"] for one in read(refresh=0)} == {0}
    assert len(read(memories=1, refresh=0)) == 1


def test_what_is_refused_has_its_reason(serving: Serving) -> None:
    client = serving.openai()
    with pytest.raises(BadRequestError, match="room"):
        client.chat.completions.create(model="lamp", messages=[{"role": "user", "content": "town " * 1500}])


def test_whoever_cancels_ends_it_on_the_server(plain: Plain, serving: Serving) -> None:
    parts = serving.openai().chat.completions.create(model="lamp", messages=ASKED, max_tokens=1000, stream=True)
    assert any(part.choices[0].delta.content for part in parts)
    _wait_for(plain, 1)
    parts.close()
    _wait_for(plain, 0)


def _wait_for(plain: Plain, running: int) -> None:
    """Wait until so many requests run on the server."""
    until = time.monotonic() + 60
    found = None
    while found != running:
        assert time.monotonic() < until, found
        text = httpx.get(plain.url.removesuffix("/v1") + "/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        found = sum(float(line.split()[-1]) for line in lines)
        time.sleep(0.2)


def test_servers_that_are_none(runtime: Runtime, plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match="does not serve gate"):
        RemoteAdapter(runtime, plain.url, model="gate")
    with pytest.raises(ConfigError, match="has no option slots"):
        RemoteAdapter.over(runtime, runtime.device, {"url": plain.url, "slots": 3})
    monkeypatch.setenv(VARIABLE, "a wrong one")
    with pytest.raises(RemoteError, match="wants a key; set VLLM_API_KEY"):
        RemoteAdapter(runtime, plain.url)


def test_a_server_that_is_killed(plain: Plain, served: FrontAdapter, runtime: Runtime, serving: Serving) -> None:
    """The last test: answers under way end with an error, and so do later ones; the front door goes on."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    settings = GenerateConfig(max_new_tokens=1000)
    request = Request(Prompt("The harbour lamp"), settings, runtime.stream(served.dtype))
    served.engine.submit([request], lambda _, event: events.put(event))
    client = serving.openai()
    parts = iter(client.chat.completions.create(model="lamp", messages=ASKED, max_tokens=1000, stream=True))
    next(parts)
    while not isinstance(events.get(timeout=60), Piece):
        pass
    plain.process.kill()
    with pytest.raises(OpenAIError, match="engine behind this server failed"):
        list(parts)
    while not isinstance(event := events.get(timeout=60), Failure):
        pass
    assert isinstance(event.error, RemoteError)
    assert plain.url in str(event.error)
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(model="lamp", messages=ASKED)
    assert (caught.value.status_code, caught.value.code) == (502, "engine_failed")
    with serving.http() as http:
        assert http.get("/health").status_code == 200
