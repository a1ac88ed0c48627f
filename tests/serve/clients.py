"""Clients that ask without a pause, each about its own source, and what they saw."""

import json
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

_TRIES = 0.2
"""Seconds until a request that was refused with 429 is sent again."""
_GLANCE = 2.0
"""Seconds between two looks at the server's memory."""


@dataclass(frozen=True)
class Question:
    """What a client asks again and again."""

    source: str
    """The source that its memories must be of."""
    body: Mapping[str, Any]


@dataclass
class Seen:
    """What clients saw in a while."""

    seconds: float = 0.0
    answers: int = 0
    mixed: list[str] = field(default_factory=list)
    """Answers with a memory of another source."""
    changed: list[str] = field(default_factory=list)
    """Answers with other words than the same question had before."""
    refused: int = 0
    """Requests that got 429."""
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    """Seconds to the first token."""
    tokens: int = 0
    memory: list[int] = field(default_factory=list)
    """MiB of the server, time after time."""

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.first, n=20) if len(self.first) > 1 else [0.0] * 19
        return (
            f"{self.answers} answers in {self.seconds:.0f} s, {len(self.mixed)} mixed, {len(self.changed)} with other "
            f"words than alone, {self.refused} refused with 429, errors {dict(self.errors)}; "
            f"first token p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s; {self.tokens / self.seconds:.0f} tokens/s; "
            f"memory {self.memory[:: max(1, len(self.memory) // 8)]} MiB; "
            f"load of the machine {os.getloadavg()[0]:.1f}"
        )


def ask(http: httpx.Client, question: Question, seen: Seen) -> str | None:
    """Ask once, by a stream. Returns the text, or None if it was refused."""
    began, first, text, sources, tokens = time.perf_counter(), 0.0, "", set[str](), 0
    with http.stream("POST", "/v1/chat/completions", json={**question.body, "stream": True}) as response:
        if response.status_code == 429:
            seen.refused += 1
            return None
        if response.status_code != 200:
            seen.errors[str(response.status_code)] += 1
            return None
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.errors[event["error"]["message"]] += 1
                return None
            for choice in event["choices"]:
                sources |= {one["source"] for one in choice["delta"].get("memories", [])}
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += choice["delta"]["content"]
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    seen.answers += 1
    seen.tokens += tokens
    seen.first.append(first)
    if sources != {question.source}:
        seen.mixed.append(f"{question.source}: {sorted(sources)}")
    return text


def load(
    url: str, process: int, clients: Sequence[Sequence[Question]], seconds: float, alone: Mapping[str, str]
) -> Seen:
    """Let each client ask its questions in turn for a while. ``alone`` has the texts that are expected, by body."""
    began, each = time.perf_counter(), [Seen() for _ in clients]
    memory: list[int] = []

    def visit(questions: Sequence[Question], seen: Seen) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            turn = 0
            while time.perf_counter() - began < seconds:
                question = questions[turn % len(questions)]
                try:
                    text = ask(http, question, seen)
                except httpx.HTTPError as error:
                    seen.errors[type(error).__name__] += 1
                    text = None
                if text is None:
                    time.sleep(_TRIES)
                    continue
                turn += 1
                if text != alone.get(key(question), text):
                    seen.changed.append(f"{question.source}: {text!r}")

    threads = [threading.Thread(target=visit, args=one) for one in zip(clients, each, strict=True)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(resident(process))
        time.sleep(_GLANCE)
    total = Seen(time.perf_counter() - began, memory=memory)
    for seen in each:
        total.answers += seen.answers
        total.mixed += seen.mixed
        total.changed += seen.changed
        total.refused += seen.refused
        total.errors += seen.errors
        total.first += seen.first
        total.tokens += seen.tokens
    return total


def key(question: Question) -> str:
    """Tells questions apart."""
    return json.dumps(question.body, sort_keys=True)


def resident(process: int) -> int:
    """MiB of a process in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10
