"""A server that many clients keep busy, and one that is killed in the middle."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from m3runtime.cli.demo import HANDBOOK
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace, model_path, new_place  # noqa: F401 - fixtures
from tests.serve.clients import Question, Seen, ask, key, load
from tests.serve.corpus_server import Client
from tests.serve.process import served

pytestmark = [pytest.mark.load, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("M3_LOAD_SECONDS", "300"))
ROOM = 48
"""MiB that a server may grow by once it is warm: what an allocator keeps."""


def facts(number: int) -> str:
    """A text whose words are in no other source."""
    words = [f"{word}{number:02}" for word in ("quarry", "lantern", "ferryman", "orchard", "turnpike")]
    return "\n\n".join(f"The {one} of {words[0]} lies next to the {other}." for one, other in pairwise(words))


def asks(name: str, question: str, **memory: Any) -> dict[str, Any]:
    return {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
        "stream_options": {"include_usage": True},
        "memory": memory,
    }


def measure(
    url: str, process: int, clients: Sequence[Sequence[Question]], seconds: float, capsys: pytest.CaptureFixture[str]
) -> Seen:
    """One client, then all; print what they saw, and check it."""
    alone: dict[str, str] = {}
    with httpx.Client(base_url=url, timeout=120) as http:
        for question in (one for questions in clients for one in questions):
            text = ask(http, question, Seen())
            assert text is not None
            alone[key(question)] = text
    one = load(url, process, clients[:1], seconds / 10, alone)
    seen = load(url, process, clients, seconds, alone)
    with capsys.disabled():
        sys.stdout.write(f"\n1 client: {one}\n{len(clients)} clients: {seen}\n")
    assert seen.mixed == []
    assert seen.errors == {}
    assert len(seen.memory) > 8
    warm = seen.memory[len(seen.memory) // 4 : len(seen.memory) // 2]
    assert max(seen.memory) <= max(warm) + ROOM
    return seen


def test_32_clients_each_about_its_own_source(
    new_place: NewPlace,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a filter in half of the requests, and by the question alone in the others. There is room for 24 at once."""
    place = new_place(tmp_path)
    place.configure(serve={"name": "tiny", "queue": 16}, model={"rows": 8})
    clients = []
    for number in range(32):
        source = place.text(f"facts/{number}.md", facts(number))
        question = f"What is the lantern{number:02} of quarry{number:02} next to?"
        own = {"sources": [source]}, {"memories": 1, "refresh": 0}
        clients.append([Question(source, asks("tiny", question, **memory)) for memory in own])
    assert place.m3("write", "facts").code == 0
    with served(place.folder) as (url, process):
        seen = measure(url, process.pid, clients, SECONDS, capsys)
    assert seen.changed == []
    assert seen.refused > 0


@pytest.mark.real_model
def test_8_clients_with_a_real_model(
    smollm2_path: Path, minilm_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    place.configure(
        bank="./bank",
        model={"path": str(smollm2_path)},
        memory={"attention_temperature": 0.9},
        codec={"kind": "scalar"},
        embedder={"path": str(minilm_path)},
        recall={"when_late": "wait"},
        generate={"prompt": "reference"},
        serve={"name": "smollm2"},
    )
    sections = HANDBOOK.read_text().split("\n## ")[1:9]
    clients = []
    for number, section in enumerate(sections):
        title, _, text = section.partition("\n")
        source = place.text(f"facts/{number}.md", f"# {title}\n\n{text}")
        question = f"What does the handbook say about {title.lower()}?"
        clients.append([Question(source, asks("smollm2", question, sources=[source], min_score=-1))])
    assert len(clients) == 8
    assert place.process("write", "facts").code == 0
    with served(place.folder) as (url, process):
        measure(url, process.pid, clients, min(SECONDS, 120), capsys)


def test_a_server_that_is_killed_leaves_a_clean_bank(
    new_place: NewPlace,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed while it answers and adds documents: the bank verifies, and what was added before is recalled again."""
    place = new_place(tmp_path)
    place.configure(serve={"name": "tiny"})
    question = Question(place.text("facts/0.md", facts(0)), asks("tiny", "What is the lantern00?", sources=["facts"]))
    assert place.m3("write", "facts").code == 0
    draw, numbers, added = Random(5), count(1), list[int]()
    for _ in range(3):
        enough = len(added) + draw.randint(1, 4)
        with served(place.folder) as (url, process):
            seen, stopping = Seen(), threading.Event()

            def answer(url: str = url, seen: Seen = seen, stopping: threading.Event = stopping) -> None:
                with httpx.Client(base_url=url, timeout=60) as http:
                    while not stopping.is_set():
                        try:
                            ask(http, question, seen)
                        except httpx.HTTPError:
                            assert stopping.wait(60)

            def add(url: str = url, stopping: threading.Event = stopping) -> None:
                with Client.of(url) as client:
                    while not stopping.is_set():
                        number = next(numbers)
                        try:
                            job = client.ended(client.text(f"{number}.md", facts(number)))
                        except httpx.HTTPError:
                            assert stopping.wait(60)
                        else:
                            assert job["status"] == "done", job
                            added.append(number)

            threads = [threading.Thread(target=one) for one in (answer, answer, answer, add)]
            for thread in threads:
                thread.start()
            while len(added) < enough or not seen.answers:
                time.sleep(0.05)
            time.sleep(draw.random())  # anywhere in the next document
            process.kill()
            process.wait()
            stopping.set()
            for thread in threads:
                thread.join()
            assert seen.mixed == []
        checked = place.process("verify", "--json")
        assert checked.code == 0, checked.err
        assert checked.json["clean"]
    with served(place.folder) as (url, _), Client.of(url) as client:
        assert ask(client.http, question, Seen())
        for number in added:
            assert f"uploads/{number}.md" in {one["source"] for one in client.found(f"lantern{number:02}")}
    with capsys.disabled():
        sys.stdout.write(f"\nkilled 3 times, {len(added)} documents had been added\n")
