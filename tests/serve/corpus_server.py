"""A server over a bank, in a thread of this process, and what a client of its corpus does."""

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime
from m3runtime.serve import jobs
from m3runtime.serve.keys import Keys
from m3runtime.serve.served import Served
from m3runtime.serve.server import Server


def changers() -> set[BaseProcess]:
    """The processes that change banks for servers of this process."""
    return {one for one in multiprocessing.active_children() if one.name == "m3-changes"}


@contextmanager
def serving(
    file: Path, keys: str = "", *, read_only: bool = True, start: str = "forkserver", **overrides: str
) -> Iterator[str]:
    """Serve the bank of a configuration. Gives the address. ``overrides`` are keys with two underscores for a dot.

    ``start`` is how the process starts that changes the bank. "spawn", as a user's server does it, takes seconds.
    """
    changes = {"serve.port": "0", **{name.replace("__", "."): one for name, one in overrides.items()}}
    config = Config.load(file, environ={}, overrides=changes)
    before = changers()
    with patch.object(jobs, "_START", start), Runtime.open(config, read_only=read_only) as runtime:
        adapter = assembly.open_adapter(config, runtime.device)
        runtime.encoder = adapter
        server = Server(Served.of(runtime, adapter, Keys.load(None, {"M3_KEYS": keys})))
        thread = threading.Thread(target=server.serve_until_stopped)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.should_exit = True
            thread.join()
            adapter.close()
    assert not changers() - before, "a process that changes the bank outlived its server"


@dataclass(frozen=True)
class Client:
    """A client of the corpus API."""

    http: httpx.Client

    @classmethod
    @contextmanager
    def of(cls, url: str, key: str = "") -> Iterator["Client"]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            yield cls(http)

    def upload(self, name: str, content: bytes) -> httpx.Response:
        return self.http.post("/v1/corpus/documents", files={"file": (name, content)})

    def text(self, name: str, text: str) -> httpx.Response:
        return self.http.post("/v1/corpus/documents", json={"name": name, "text": text})

    def forget(self, source: str, *, erase: bool = False) -> httpx.Response:
        return self.http.delete("/v1/corpus/sources", params={"source": source, "erase": erase})

    def ended(self, response: httpx.Response) -> dict[str, Any]:
        """The job that a response tells of, once it has ended."""
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        while job["status"] not in ("done", "failed"):
            time.sleep(0.05)
            job = self.http.get(f"/v1/corpus/jobs/{job['id']}").json()
        return job

    def waits_for_a_writer(self, response: httpx.Response) -> None:
        """Return when the job that a response tells of waits for another process that writes."""
        assert response.status_code == 202, response.text
        while (
            "Waiting"
            not in (job := self.http.get(f"/v1/corpus/jobs/{response.json()['id']}").json())["progress"]["title"]
        ):
            assert job["status"] in ("queued", "running"), job
            time.sleep(0.05)

    def found(self, query: str, k: int = 3) -> list[dict[str, Any]]:
        response = self.http.post("/v1/corpus/search", json={"query": query, "k": k})
        assert response.status_code == 200, response.text
        return list(response.json()["data"])

    def sources(self, **query: Any) -> dict[str, Any]:
        response = self.http.get("/v1/corpus/sources", params=query)
        assert response.status_code == 200, response.text
        return dict(response.json())


def error(response: httpx.Response, status: int) -> str:
    """The message of a refusal: one line."""
    assert response.status_code == status, (response.status_code, response.text)
    message = json.loads(response.text)["error"]["message"]
    assert "\n" not in message
    return str(message)
