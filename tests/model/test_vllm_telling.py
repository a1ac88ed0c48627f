"""Reads and refusals travel from the scheduler's half to the HTTP server, by middleware around any application."""

import asyncio
import json
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from m3model.vllm import telling
from m3model.vllm.hearing import Hearing, new_mark
from m3model.vllm.middleware import Memories
from m3model.vllm.telling import Telling, socket_of
from m3runtime.errors import ConfigError

READ = {"tokens": 0, "memories": [{"id": 3}]}
BROKEN = {"error": {"message": "Internal server error", "code": 500}}
PART = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "lamp", "choices": [{"text": "a"}]}


@pytest.fixture
def teller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telling]:
    monkeypatch.setattr(telling.tempfile, "gettempdir", lambda: str(tmp_path))
    teller = Telling(socket_of("engine"), {"slots": 7})
    yield teller
    teller.close()


def test_only_this_user_can_listen(teller: Telling, tmp_path: Path) -> None:
    path = socket_of("engine")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    teller.close()
    assert not path.exists()
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match=str(path.parent)):
        socket_of("engine")
    path.parent.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=str(path.parent)):
        socket_of("engine")
    path.parent.unlink()
    Telling(socket_of("engine"), {}).close()
    teller = Telling(socket_of("engine"), {})  # the fixture closes the first one again, and that is fine
    teller.close()


def test_whoever_syncs_has_heard_all_that_was_told_before(teller: Telling) -> None:
    async def listen() -> None:
        hearing = await Hearing.open(socket_of("engine"))
        assert hearing.facts == {"slots": 7}
        await hearing.sync()
        mark, other = new_mark(), new_mark()
        with hearing.about(mark) as told, hearing.about(other) as theirs:
            for number in range(500):
                teller.tell({"request": f"cmpl-{mark}-0-{number:08x}", "read": {"tokens": number}})
                teller.tell({"request": f"1_cmpl-mine-{other}-2-0000abcd", "read": {"tokens": number}})
            teller.tell({"request": f"cmpl-{other}-1-8f3a9c-beam-0-0000abcd", "read": {"tokens": 0}})
            teller.tell({"request": f"cmpl-{new_mark()}-0-00000000", "error": "another's", "status": 400})
            await hearing.sync()
            assert [one["tokens"] for one in told.take()] == [*range(500)]
            assert told.take() == []
            assert {(one["prompt"], one["answer"]) for one in theirs.take()} == {(2, 1), (1, 0)}
            assert told.error is None
        teller.tell({"request": f"cmpl-{mark}-0-00000000", "read": {"tokens": 1}})  # nobody waits for it any more
        await hearing.sync()
        await hearing.close()

    asyncio.run(listen())


def test_a_listener_that_reads_nothing_stops_nobody(teller: Telling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_MOST", 1 << 16)

    async def listen() -> None:
        _, mute = await asyncio.open_unix_connection(socket_of("engine"))
        hearing = await Hearing.open(socket_of("engine"))
        await hearing.sync()
        mark = new_mark()
        with hearing.about(mark) as told:
            for _ in range(300):
                teller.tell({"request": f"cmpl-{mark}-0-0", "read": {"text": 4096 * "a"}})
                await hearing.sync()
            assert len(told.reads) == 300
        assert len(teller._writers) == 1
        mute.close()
        await hearing.close()

    asyncio.run(listen())


def test_a_hearing_ends_with_its_teller(teller: Telling) -> None:
    async def listen() -> None:
        hearing = await Hearing.open(socket_of("engine"))
        await asyncio.to_thread(teller.close)
        await hearing.sync()  # and waits for nobody
        await asyncio.gather(hearing._task)
        assert not hearing.is_open
        await hearing.sync()
        await hearing.close()

    asyncio.run(asyncio.wait_for(listen(), 10))


Answering = Callable[[str, Callable[..., Awaitable[None]]], Awaitable[None]]


def asked(
    answer: Answering, path: str = "/v1/completions", *, engine: str = "engine", **headers: str
) -> httpx.Response:
    """The response of an application to a POST, or to a GET of facts, behind the middleware."""

    async def app(scope: Any, _: Any, send: Any) -> None:
        [name] = [value.decode() for name, value in scope["headers"] if name == b"x-request-id"] or [""]

        async def respond(status: int, *bodies: bytes, kind: bytes = b"application/json") -> None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
            for number, body in enumerate(bodies):
                await send({"type": "http.response.body", "body": body, "more_body": number < len(bodies) - 1})

        await answer(name, respond)

    async def ask() -> httpx.Response:
        config = SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id=engine))
        state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
        memories = Memories(app)

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await memories({**scope, "app": SimpleNamespace(state=state)}, receive, send)

        transport = httpx.ASGITransport(app=with_state)
        async with httpx.AsyncClient(transport=transport, base_url="http://lamp") as client:
            found = await client.request("GET" if path == "/v1/m3" else "POST", path, headers=headers)
        if memories._hearing is not None:
            await memories._hearing.close()
        return found

    return asyncio.run(ask())


def data(*values: Any) -> bytes:
    return b"".join(
        b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n\n" for one in values
    )


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_refusal_has_its_reason(teller: Telling) -> None:
    async def refuses(name: str, respond: Any) -> None:
        teller.tell({"request": f"cmpl-{name}-0-12345678", "error": "no memory 7", "status": 400})
        await respond(500, *(bytes([one]) for one in json.dumps(BROKEN).encode()))

    found = asked(refuses)
    assert found.status_code == 400
    assert found.json()["error"] == {
        "message": "no memory 7", "type": "BadRequestError", "param": "kv_transfer_params", "code": 400
    }  # fmt: skip


def test_a_failure_that_nobody_explains_stays_as_it_is(teller: Telling) -> None:
    async def fails(name: str, respond: Any) -> None:
        teller.tell({"request": f"cmpl-{new_mark()}-0-12345678", "error": "another's", "status": 400})
        await respond(500, json.dumps(BROKEN).encode())

    found = asked(fails)
    assert (found.status_code, found.json()) == (500, BROKEN)


def test_a_stream_has_reads_where_they_are_told_and_at_the_latest_at_its_end(teller: Telling) -> None:
    async def streams(name: str, respond: Any) -> None:
        teller.tell({"request": f"cmpl-{name}-0-12345678", "read": READ})
        await asyncio.sleep(0.2)
        teller.tell({"request": f"cmpl-{name}-0-12345678", "read": {**READ, "tokens": 64}})
        await respond(200, data(PART), data(PART, b"[DONE]"), kind=b"text/event-stream; charset=utf-8")

    first, second, last, done = events(asked(streams))
    assert first == {**PART, "kv_transfer_params": {"m3": {"reads": [{**READ, "prompt": 0, "answer": 0}]}}}
    assert second == PART
    assert last["choices"] == []
    assert last["id"] == "cmpl-1"
    assert last["kv_transfer_params"]["m3"]["reads"][0]["tokens"] == 64
    assert done == "[DONE]"


def test_a_stream_ends_with_the_reason(teller: Telling) -> None:
    async def streams(name: str, respond: Any) -> None:
        teller.tell({"request": f"chatcmpl-{name}-12345678", "error": "an internal error; see the log", "status": 500})
        await respond(200, data(BROKEN, b"[DONE]"), kind=b"text/event-stream")

    error, done = events(asked(streams))
    assert error["error"]["message"] == "an internal error; see the log"
    assert error["error"]["code"] == 500
    assert done == "[DONE]"


def test_a_client_names_its_request_and_cannot_name_anothers(teller: Telling) -> None:
    names: list[str] = []

    async def answers(name: str, respond: Any) -> None:
        names.append(name)
        await respond(200, b"{}")

    stolen = new_mark()
    asked(answers, **{"X-Request-Id": stolen})
    [name] = names
    assert name.startswith(stolen + "-m3-")
    assert len(name) == 2 * len(stolen) + 1


def test_facts_are_told_where_the_application_lets_the_request_pass(teller: Telling) -> None:
    async def knows_nothing(_: str, respond: Any) -> None:
        await respond(404, b"{}")

    async def wants_a_key(_: str, respond: Any) -> None:
        await respond(401, b"{}")

    assert asked(knows_nothing, "/v1/m3").json() == {"slots": 7}
    assert asked(wants_a_key, "/v1/m3").status_code == 401
    assert asked(knows_nothing, "/v1/m4").status_code == 404


def test_without_a_teller_all_passes(teller: Telling) -> None:
    async def fails(_: str, respond: Any) -> None:
        await respond(500, json.dumps(BROKEN).encode())

    assert asked(fails, engine="another").json() == BROKEN
    assert socket_of("engine").exists()
