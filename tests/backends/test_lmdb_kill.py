"""A process that commits and forgets is killed at random moments; whatever it was told is done, is done."""

import time
from itertools import islice
from pathlib import Path
from random import Random

import lmdb
import torch

from m3backends.lmdb.home import LmdbHome
from m3runtime.memory.block import check
from m3runtime.testing.blocks import STAMP, make_ids
from m3runtime.testing.home import check_whole
from tests.forked import Program

SLOT_BYTES = 64 << 10
KILLS = 12

WRITER = f"""
import os, sys
from m3backends.lmdb.home import LmdbHome
from m3runtime.testing.blocks import make_batch

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

with LmdbHome(path=sys.argv[1], slot_bytes={SLOT_BYTES}) as home:
    while True:
        first = home.next_id()
        batch = make_batch(range(first, first + 1 + first % 4), {SLOT_BYTES})
        home.commit(batch)
        say("committed", *batch.ids)
        if first % 3 == 0:
            gone = home.ids()[first % 5 : first % 5 + 2]
            say("forgetting", *gone)
            home.discard(gone)
            say("forgot", *gone)
"""


def live_and_die(path: Path, random: Random) -> list[list[str]]:
    """What a writer said until it was killed."""
    patience = random.randrange(1, 12)
    with Program(WRITER, path) as writer:
        said = [line.split() for line in islice(writer.stdout, patience)]
        time.sleep(random.random() * 0.01)
        writer.kill()
        return said + [line.split() for line in writer.stdout]


def numbers_of_records(path: Path) -> set[int]:
    """How many records the databases have that are keyed by reference; one number if none is half there."""
    with lmdb.open(str(path), max_dbs=16, readonly=True) as env:
        names = (b"blocks", b"references", b"digests", b"embeddings", b"members")
        databases = [env.open_db(name, create=False) for name in names]
        with env.begin() as txn:
            return {txn.stat(database)["entries"] for database in databases}


def test_what_was_committed_survives_kill_9_and_nothing_is_half_there(tmp_path: Path) -> None:
    random, held, next_id = Random(20), set[int](), 0
    for _ in range(KILLS):
        forgetting: set[int] = set()
        for verb, *words in live_and_die(tmp_path / "home", random):
            ids = {int(word) for word in words}
            if verb == "committed":
                held |= ids
                next_id = max(ids) + 1
            else:
                forgetting = ids if verb == "forgetting" else set()
                held -= ids
        with LmdbHome(path=tmp_path / "home") as home:
            there = set(home.ids().tolist())
            # The call that was cut short is wholly done or not at all.
            unfinished = set(range(next_id, next_id + 1 + next_id % 4))
            assert home.next_id() in (next_id, max(unfinished) + 1)
            if home.next_id() > next_id:
                held, next_id = held | unfinished, max(unfinished) + 1
            assert there in (held, held | forgetting)
            held = there
            check_whole(home, home.ids())
            out = torch.zeros((len(there), SLOT_BYTES), dtype=torch.uint8)
            home.read(home.ids(), out)
            for row, id in enumerate(home.ids().tolist()):
                check(out[row].numpy(), id=id, stamp=STAMP)
            gone = make_ids(*(set(range(next_id)) - there))
            assert home.references(gone) == [None] * len(gone)
            assert not home.contains(gone).any()
        assert numbers_of_records(tmp_path / "home") == {len(there)}
    assert len(held) > KILLS
