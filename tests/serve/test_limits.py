"""Limits, vanished clients, hostile requests, and the end of a server."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import APIError

from m3runtime.retrieval.embedder import Embeddings
from tests.serve.serving import TOPICS, Serving, data_of, tiny

SLOW = 400
"""Tokens of an answer that takes seconds."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Serving]:
    """A server with one row, one place in its queue, and small limits."""
    serve = {"queue": 1, "body": 4000, "prompt_tokens": 60, "answer_tokens": SLOW, "timeout": 60}
    with tiny(tmp_path, serve=serve, model={"path": "tiny", "rows": 1}) as one:
        yield one


def until(what: object) -> None:
    """Wait until a function is true."""
    deadline = time.monotonic() + 20
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin(serving: Serving, **fields: object) -> tuple[httpx.Client, Iterator[bytes]]:
    """A stream that has begun."""
    client = serving.http()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "lamp"}], "stream": True, **fields}
    response = client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)
    assert response.status_code == 200
    pieces = response.iter_raw()
    next(pieces)
    return client, pieces


def test_a_full_queue_is_429_and_a_client_that_vanishes_frees_its_row(small: Serving) -> None:
    gate = small.server.served.gate
    first, _one = begin(small, max_tokens=SLOW)
    second, _other = begin(small, max_tokens=SLOW)
    refused = small.chat("lamp")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert small.chat("lamp", n=3).status_code == 400  # never
    second.close()  # while it waits
    until(lambda: gate.taken == 1)
    first.close()  # while it decodes
    until(lambda: gate.taken == 0)
    assert small.chat("lamp", max_tokens=2).status_code == 200
    assert not small.server.served.running
    assert small.server.served.runtime.metrics().store.leased == 0


def test_a_client_that_vanishes_while_it_waits_for_a_whole_answer_frees_its_row(small: Serving) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "lamp"}], "max_tokens": SLOW}).encode()
    kind = "Content-Type: application/json"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", small.server.port)) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: small.server.served.gate.taken == 1)
    until(lambda: small.server.served.gate.taken == 0)
    answers = small.server.served.meter.snapshot()[2]
    assert answers["cancel"] == 1


def test_a_client_that_does_not_read_holds_no_row(small: Serving) -> None:
    fields = {"max_tokens": 200, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "lamp"}], **fields}).encode()
    kind = "Content-Type: application/json\r\nConnection: close"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    gate = small.server.served.gate
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", small.server.port))
        connection.sendall(head.encode() + body)
        until(lambda: gate.taken == 1)
        until(lambda: gate.taken == 0)
        assert small.chat("lamp", max_tokens=2).status_code == 200
        told = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert told.count(b"top_logprobs") > 100  # the answer waited for its reader
    assert b"data: [DONE]" in told


def test_a_request_that_takes_too_long_is_cancelled(tmp_path: Path) -> None:
    with tiny(tmp_path, serve={"timeout": 0.2}) as serving:
        late = serving.chat("lamp", max_tokens=SLOW)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        *_, last = data_of(iter(serving.chat("lamp", max_tokens=SLOW, stream=True).text.splitlines()))
        assert last["error"]["code"] == "timeout"
        body = {"model": "tiny", "input": "lamp", "max_output_tokens": SLOW, "stream": True}
        with pytest.raises(APIError, match="too long"):
            list(serving.openai().responses.create(**body))  # type: ignore[call-overload]
        with serving.http() as client:
            *before, last = data_of(iter(client.post("/v1/responses", json=body).text.splitlines()))
        assert (last["type"], last["code"], last["sequence_number"]) == ("error", "timeout", len(before))
        until(lambda: serving.server.served.gate.taken == 0)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\u0000b"}], "max_tokens": 2}', 200, None),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, None),
        (b"[" * 3000, 400, None),
        (b'{"model": "' + b"x" * 5000 + b'"}', 413, "request_too_large"),
    ],
)
def test_hostile_bodies_are_refused_in_one_line(small: Serving, content: bytes, status: int, code: str | None) -> None:
    with small.http() as client:
        response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status, response.text
        if status != 200:
            assert "\n" not in response.json()["error"]["message"]
            assert code is None or response.json()["error"]["code"] == code
        assert client.get("/health/ready").status_code == 200


def test_a_body_of_no_declared_length_is_counted(small: Serving) -> None:
    def blocks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1000

    with small.http() as client:
        assert client.post("/v1/chat/completions", content=blocks()).status_code == 413


def test_embeddings_have_limits_too(small: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    served = small.server.served
    embedder, began, go_on = served.runtime.retriever.embedder, threading.Event(), threading.Event()
    embed = embedder.embed_queries
    seen: list[int] = []

    def slow(texts: Sequence[str]) -> Embeddings:
        seen.append(len(texts))
        began.set()
        go_on.wait()
        return embed(texts)

    monkeypatch.setattr(embedder, "embed_queries", slow)
    body = json.dumps({"model": "tiny", "input": ["lamp"] * 100}).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", small.server.port)) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\n" + head.encode() + body)
        began.wait()
    go_on.set()
    until(lambda: served.gate.taken == 0)
    assert sum(seen) < 100  # the others of its texts were left


def test_only_uploads_may_be_as_long_as_uploads(small: Serving) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with small.http() as client:
        response = client.post("/v1/chat/completions", content=b"x" * 5000, headers=headers)
    assert response.status_code == 413


def test_a_body_without_its_type_is_told_so(small: Serving) -> None:
    with small.http() as client:
        response = client.post("/v1/chat/completions", content=b'{"model": "tiny"}')
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_body_that_trickles_is_not_waited_for(tmp_path: Path) -> None:
    headers = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100"
    with (
        tiny(tmp_path, serve={"timeout": 0.3}) as serving,
        socket.create_connection(("127.0.0.1", serving.server.port), timeout=20) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + headers + b"\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_prompts_and_answers_have_limits_of_their_own(small: Serving) -> None:
    long = small.chat("lamp " * 30)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert small.chat("lamp", max_tokens=SLOW + 1).json()["error"]["param"] == "max_tokens"


def test_a_prompt_beyond_the_models_positions_has_the_code_that_clients_look_for(tmp_path: Path) -> None:
    with tiny(tmp_path, serve={"prompt_tokens": None}) as serving:
        long = serving.chat("lamp " * 2000)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "positions" in long.json()["error"]["message"]


def test_errors_are_objects_and_say_nothing_of_the_bank(small: Serving) -> None:
    with small.http() as client:
        for method, path in (("GET", "/nothing"), ("GET", "/v1/chat/completions"), ("POST", "/v1/embeddings")):
            response = client.request(method, path)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert not any(text in response.text for text in TOPICS.values())


def test_clients_in_parallel_read_only_what_their_own_request_allows(serving: Serving) -> None:
    names = [f"{name}.txt" for name in TOPICS]

    def ask(number: int) -> set[str]:
        source = names[number % len(names)]
        message = serving.chat("the harbour wall lamp", memory={"sources": [source]}).json()["choices"][0]["message"]
        read = {one["source"] for one in message["memories"]}
        cited = {one["url_citation"]["title"] for one in message["annotations"]}
        return (read | cited) ^ {source}

    with ThreadPoolExecutor(16) as pool:
        assert [strange for strange in pool.map(ask, range(48)) if strange] == []


def test_a_server_that_is_stopped_finishes_running_answers(tmp_path: Path) -> None:
    with tiny(tmp_path, serve={"grace": 30}) as serving:
        client, pieces = begin(serving, max_tokens=100)
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.extend(pieces))
        reading.start()
        serving.server.should_exit = True
        reading.join()
        client.close()
    assert b"".join(found).endswith(b"data: [DONE]\n\n")


def test_a_server_that_is_stopped_cancels_what_takes_longer_than_its_grace(tmp_path: Path) -> None:
    with tiny(tmp_path, serve={"grace": 1}) as serving:
        served = serving.server.served
        client, _pieces = begin(serving, max_tokens=450)
        serving.server.should_exit = True
        until(lambda: not served.running)
        client.close()
    assert served.gate.taken == 0
