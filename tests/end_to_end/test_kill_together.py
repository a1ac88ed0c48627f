"""One process writes and forgets while others read, and any of them is killed at any moment, again and again.

Nothing that was committed is lost, nothing that was forgotten comes back, nobody ever sees half of anything, and
`m3 verify` finds nothing wrong.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

import pytest

from tests.end_to_end.commands import Contents, Place
from tests.forked import Program

SHORT, LONG = 12, 300
MOST = 40
"""Memories that the bank holds at about most: what is too many is forgotten."""

# Starts a writer and two readers for every line it reads, and says when all of them are dead.
# Each opens the bank itself: a home must not cross a fork.
NURSERY = (
    f"MOST = {MOST}"
    + '''
import json, os, sys, threading, time
from random import Random

import numpy as np
import torch
import m3runtime.codecs.raw
import tests.end_to_end.embedders
from m3runtime import assembly
from m3runtime.memory import block
from m3runtime.config.schema import Config
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.runtime import Runtime
from m3runtime.documents.reference import Place, Reference
from m3runtime.storage.home import Batch


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())


def memories(spec, ids):
    """What only these ids have."""
    shape = (len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim)
    rows = torch.stack([torch.full(shape, float(int(id) % 65_521)) for id in ids])
    return MemoryTensors(rows, -rows, torch.full((len(ids),), spec.tokens))


def reference(id):
    text = f"Keeper {id} lit the lamp on day {id * 37 % 1000}."
    # As many tokens as make large blocks.
    return Reference(text, 128, places=(Place(f"log/{id % 5}.md", 0, len(text)),))


def write(runtime, random):
    """Commit for ever, while a thread forgets and another recalls."""
    bank = runtime.bank

    def forget():
        while True:
            time.sleep(0.002)
            ids = bank.home.ids()
            if len(ids) > MOST // 2 or (len(ids) and random.random() < 0.2):
                gone = sorted(random.sample(ids.tolist(), min(len(ids), random.randrange(1, 6))))
                say("forgetting", *gone)
                runtime.forget(gone)
                say("forgot", *gone)

    for work in (forget, lambda: read(runtime, Random(1))):
        threading.Thread(target=work, daemon=True).start()
    while True:
        first = bank.home.next_id()
        ids = np.arange(first, first + random.randrange(1, 5), dtype="uint64")
        references = [reference(int(id)) for id in ids]
        vectors = runtime.retriever.embedder.embed_references([one.text for one in references])
        batch = Batch(ids, bank.blocks(ids, memories(bank.manifest.spec, ids)), references, vectors)
        say("committing", *ids)
        bank.home.commit(batch)
        say("committed", *ids)
        runtime.retriever.index.add(ids, vectors)
        if random.random() < 0.2:
            assembly.bank_index(runtime.config, bank).save(runtime.retriever.index)


def read(runtime, random):
    """Read for ever: whatever is there is whole and right."""
    home, spec = runtime.bank.home, runtime.bank.manifest.spec
    while True:
        ids = home.ids()
        some = sorted(random.sample(ids.tolist(), min(len(ids), 8)))
        wanted = memories(spec, some) if some else None
        for id, (keys, values) in runtime.fetch(some, torch.float32).items():
            row = some.index(id)
            if not (torch.equal(keys, wanted.keys[row]) and torch.equal(values, wanted.values[row])):
                say("wrong", "memory", id)
        for id, one in zip(some, home.references(np.array(some, "uint64")), strict=True):
            if one not in (None, reference(id)):
                say("wrong", "reference", id)
        if home.quarantined():
            say("wrong", "quarantined", *home.quarantined())
        for found in runtime.search(["Keeper lit the lamp"]):
            runtime.references([match.id for match in found])


def live(role, seed, durability):
    config = Config.load("m3.yaml", environ={}, overrides={"tiers.1.durability": durability})
    with Runtime.open(config, read_only=role != "write") as runtime:
        (write if role == "write" else read)(runtime, Random(seed))


torch.set_num_threads(1)
os.chdir(sys.argv[1])
for line in sys.stdin:
    seed, durability = json.loads(line)
    children = {}
    for role in ("write", "read", "read"):
        child = os.fork()
        if not child:
            try:
                live(role, seed + len(children), durability)
            except BaseException as error:
                say("wrong", role, type(error).__name__, str(error).replace("\\n", " "))
            os._exit(1)
        children[child] = role
    say("born", *children)
    for child in children:
        os.waitpid(child, 0)
    say("dead")
'''
)


@dataclass
class Life:
    """What the processes of one round said."""

    committed: list[set[int]] = field(default_factory=list)
    unfinished: set[int] = field(default_factory=set)
    """What was being committed when the writer died: all of it is there, or nothing."""
    forgotten: set[int] = field(default_factory=set)
    forgetting: set[int] = field(default_factory=set)
    """What was being forgotten then: likewise."""
    wrong: list[str] = field(default_factory=list)

    def heard(self, verb: str, words: list[str]) -> None:
        match verb:
            case "committing":
                self.unfinished = set(map(int, words))
            case "committed":
                self.committed.append(set(map(int, words)))
                self.unfinished = set()
            case "forgetting":
                self.forgetting = set(map(int, words))
            case "forgot":
                self.forgotten |= set(map(int, words))
                self.forgetting = set()
            case "wrong":
                self.wrong.append(" ".join(words))


@dataclass
class Nursery:
    process: Program

    def round(self, random: Random) -> Life:
        """Start a writer and two readers, and kill them one after the other in any order."""
        durability = random.choice(["full", "commit", "relaxed"])
        self.process.stdin.write(json.dumps([random.randrange(1 << 30), durability]) + "\n")
        self.process.stdin.flush()
        life, children = Life(), list[int]()
        patience = random.choice([0, 1, 2, 6, 12])  # commits before the first is killed; 0: while they open the bank
        for line in self.process.stdout:
            verb, *words = line.split()
            life.heard(verb, words)
            if verb == "born":
                children = list(map(int, words))
            if children and (len(life.committed) >= patience or life.wrong):
                random.shuffle(children)
                for child in children:
                    time.sleep(random.random() ** 2 * 0.1)
                    os.kill(child, signal.SIGKILL)
                children = []
            if verb == "dead":
                return life
        raise AssertionError("the nursery itself died")


@contextmanager
def nursery(place: Place) -> Iterator[Nursery]:
    with Program(NURSERY, place.folder) as process:
        yield Nursery(process)


def kill_again_and_again(place: Place, kills: int, seed: int) -> None:
    """Three kills a round."""
    place.configure(
        memory={"layers": [0]},
        codec={"kind": "raw"},
        tiers=[{"kind": "pinned", "capacity": "256KiB"}, {"kind": "lmdb"}],
    )
    place.text("first.txt", "The keepers keep a log.")
    assert place.m3("write", "first.txt").code == 0
    assert place.m3("forget", "0").code == 0  # what is left is a bank without memories
    random, held, next_id = Random(seed), set[int](), 1
    with nursery(place) as processes:
        for _ in range(kills // 3):
            life = processes.round(random)
            assert life.wrong == []
            there = place.contents()  # every block is checked, and every id has all its parts
            held, next_id = check(life, there, held, next_id)
            report = place.m3("verify", "--json")
            assert report.code == 0, json.loads(report.out)["damage"]
    assert next_id > kills // 3


def check(life: Life, there: Contents, held: set[int], next_id: int) -> tuple[set[int], int]:
    """Fail unless a bank that held this before the round holds what it must. Returns what it holds, and its next id."""
    ids = set(there.blocks)
    gone = life.forgotten | life.forgetting
    sure = max([next_id, *(max(batch) + 1 for batch in life.committed)])
    landed = bool(life.unfinished) and (life.unfinished <= gone or bool((life.unfinished - gone) & ids))
    before = held.union(*life.committed, life.unfinished if landed else ()) - life.forgotten
    assert ids in (before, before - life.forgetting)
    assert there.next_id == (max(life.unfinished) + 1 if landed else sure)
    return ids, there.next_id


def test_killed_while_others_read(place: Place) -> None:
    kill_again_and_again(place, SHORT, seed=5)


@pytest.mark.kill
@pytest.mark.timeout(3600)
def test_killed_three_hundred_times(place: Place) -> None:
    kill_again_and_again(place, LONG, seed=6)
