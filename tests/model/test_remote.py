"""A server at a URL that is down, is none, refuses, or breaks off. `tests/vllm/test_url.py` has a real one."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from m3model.remote.server import KEY, Part, VllmServer
from m3model.vllm.wish import Head
from m3runtime.errors import ConfigError, InputError, RemoteError

MODELS = {"data": [{"id": "lamp", "max_model_len": 64}, {"id": "gate", "max_model_len": 32}]}
FACTS = {"sink": [7, 8], "slots": 5, "placeholder": 9, "bank": "b" * 32}
FOUND = VllmServer("http://127.0.0.1:1/v1", "lamp", 64, Head((7, 8), 5, 9), "b" * 32)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(asked))  # type: ignore[attr-defined]
        self.reply()

    def reply(self) -> None:
        status, body, kind = self.server.replies.get(self.path, (404, b"{}", "application/json"))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


class Place:
    """A server of scripted replies."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self.asked: list[Any] = []
        server.asked = self.asked  # type: ignore[attr-defined]
        server.replies = {}  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        self.say("/v1/models", MODELS)
        self.say("/v1/m3", FACTS)

    def say(self, path: str, body: Any, status: int = 200) -> None:
        self._server.replies[path] = status, json.dumps(body).encode(), "application/json"  # type: ignore[attr-defined]

    def stream(self, *events: Any, status: int = 200) -> None:
        text = "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in events)
        self._server.replies["/v1/completions"] = status, text.encode(), "text/event-stream"  # type: ignore[attr-defined]


@pytest.fixture
def place() -> Iterator[Place]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Place(server)
    server.shutdown()
    server.server_close()
    thread.join()


def answer(server: VllmServer, wish: Any = None, **sampling: Any) -> list[Part]:
    async def ask() -> list[Part]:
        async with server.client() as client:
            return [part async for part in server.answer(client, [7, 8, 20], sampling, wish)]

    return asyncio.run(ask())


def token(id: int, **more: Any) -> Any:
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": "a", "token_ids": [id], **more}]}


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_server_says_who_it_is(place: Place, path: str) -> None:
    found = VllmServer.find(place.url.removesuffix("/v1") + path)
    assert found == VllmServer(place.url, "lamp", 64, FOUND.head, FOUND.bank)
    assert VllmServer.find(place.url, "gate").length == 32


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1/v1", "http://", "file:///etc/passwd"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a vLLM server"):
        VllmServer.find(url)


def test_a_server_that_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RemoteError, match=f"{url} cannot be reached"):
        VllmServer.find(url)
    down = VllmServer(url, "lamp", 64, FOUND.head, FOUND.bank)
    with pytest.raises(RemoteError, match=f"{url} broke off"):
        answer(down)


def test_a_server_that_is_another(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match="does not serve wall"):
        VllmServer.find(place.url, "wall")
    place.say("/v1/m3", {}, 404)
    with pytest.raises(RemoteError, match="reads no memories: start vLLM with our connector and --middleware"):
        VllmServer.find(place.url)
    place.say("/v1/m3", {"sink": [7]})
    with pytest.raises(RemoteError, match="tells something else than this release expects"):
        VllmServer.find(place.url)
    place.say("/v1/models", [])
    with pytest.raises(RemoteError, match="is no server of vLLM"):
        VllmServer.find(place.url)
    monkeypatch.delenv(KEY, raising=False)
    place.say("/v1/models", {}, 401)
    with pytest.raises(RemoteError, match=f"wants a key; set {KEY}"):
        VllmServer.find(place.url)


def test_an_answer_has_tokens_log_probabilities_and_reads(place: Place) -> None:
    told = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:3": -0.5, "token_id:4": -1.5, "token_id:5": -0.1}]}
    read = {"tokens": 0, "memories": [{"id": 3, "score": 0.5}]}
    place.stream(
        {**token(3, logprobs=told), "kv_transfer_params": {"m3": {"reads": [read]}}},
        {"id": "cmpl-1", "choices": []},
        "[DONE]",
    )
    first, last = answer(VllmServer.find(place.url), {"refresh": 1}, logprobs=2, max_tokens=5)
    assert (first.tokens, first.reads) == ((3,), (read,))
    [one] = first.log_probs
    assert (one.token, one.log_prob, one.likeliest) == (3, -0.5, ((5, -0.1), (3, -0.5)))
    assert last == Part((), (), ())
    [asked] = place.asked
    assert asked["kv_transfer_params"] == {"m3": {"refresh": 1}}
    assert (asked["model"], asked["prompt"], asked["max_tokens"]) == ("lamp", [7, 8, 20], 5)


def test_a_refusal_is_the_clients_and_a_failure_is_not(place: Place) -> None:
    server = VllmServer.find(place.url)
    for error, status, kind in (
        ("memories: too many", 400, InputError),
        ("no such model", 404, RemoteError),
        ("Internal server error", 500, RemoteError),
    ):
        place.say("/v1/completions", {"error": {"message": error, "code": status}}, status)
        with pytest.raises(kind, match=error):
            answer(server)
        place.stream(token(3), {"error": {"message": error, "code": status}}, "[DONE]")
        with pytest.raises(kind, match=error):
            answer(server)
    place.say("/v1/completions", {}, 401)
    with pytest.raises(RemoteError, match=f"wants another key; set {KEY}"):
        answer(server)


def test_an_answer_that_is_cut(place: Place) -> None:
    place.stream(token(3))
    with pytest.raises(RemoteError, match="broke off before the end"):
        answer(VllmServer.find(place.url))
