"""``m3 verify`` finds every kind of damage, repairs what can be repaired, and loses no text while it does."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from m3backends.records import digest
from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.memory import block
from m3runtime.memory.block import as_ids
from m3runtime.runtime import Runtime
from m3runtime.writing.encoding import GROUP
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery, errors
from tests.forked import Program
from tests.hostile import raw
from tests.model.families import make_model, make_tokenizer

QUESTION = "What does the harbour lamp of Uskerfold burn?"
BAD = 2
"""The memory that tests damage."""
KEY = raw.key_of(BAD)

Work = Callable[[Place], None]


def verify(place: Place, *arguments: object, code: int = 0) -> Any:
    result = place.m3("verify", "--json", *arguments)
    assert result.code == code, result
    (line,) = result.out.splitlines()
    report = json.loads(line)
    assert report["clean"] == (code == 0)
    return report


def damage(report: Any) -> set[tuple[str, int | None]]:
    return {(one["where"], one["id"]) for one in report["damage"]}


def changed(database: str, work: Callable[[bytes], bytes | None], key: bytes = KEY, *, seal: bool = False) -> Work:
    """Replace a record by what ``work`` makes of it, behind a seal that fits if ``seal``; None removes it."""

    def change(place: Place) -> None:
        old = raw.get(place, database, key)
        new = work(old[8:] if seal else old)
        with raw.records(place, database) as (txn, _):
            if new is None:
                txn.delete(key)
            else:
                txn.put(key, raw.sealed(database, key, new) if seal else new)

    return change


def another(place: Place) -> None:
    raw.put(place, "blocks", KEY, raw.get(place, "blocks", raw.key_of(3)))


def resealed(work: Callable[[np.ndarray[Any, Any], int], int]) -> Work:
    """Change a block and its number of tokens behind a digest that fits."""

    def change(place: Place) -> None:
        bank = assembly.open_bank(Config.load(place.file, environ={}), read_only=True)
        slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
        assert bank.home.read(as_ids([BAD]), slot)[0]
        row = slot[0].numpy()
        tokens = work(row, int(block.headers(row[None])["tokens"][0]))
        size = bank.codec.payload_bytes(tokens)
        block.seal(row, id=BAD, tokens=tokens, payload_bytes=size, stamp=bank.stamp)
        bank.close()
        raw.put(place, "blocks", KEY, row[: block.HEADER_BYTES + size].tobytes())

    return change


def fewer_tokens(_: Any, tokens: int) -> int:
    return tokens // 2


def no_numbers(row: Any, tokens: int) -> int:
    row[block.HEADER_BYTES :] = 0xFF  # scales that are not finite
    return tokens


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def of_text(database: str, work: Callable[[bytes], bytes | None], *, seal: bool = False) -> Work:
    """`changed`, of the entry that the memory's text has."""

    def change(place: Place) -> None:
        reference = place.contents().references[BAD]
        changed(database, work, digest(reference.text, reference.heading), seal=seal)(place)

    return change


def of_source(work: Callable[[bytes], bytes | None]) -> Work:
    """`changed`, of the record that the memory's source has."""

    def change(place: Place) -> None:
        changed("sources", work, digest(place.contents().references[BAD].source))(place)

    return change


def no_member(place: Place) -> None:
    source = digest(place.contents().references[BAD].source)
    with raw.records(place, "members") as (txn, _):
        assert txn.delete(source, KEY)


MENDABLE: dict[str, tuple[Work, str]] = {
    "a flipped bit": (changed("blocks", lambda old: raw.flip(old, 8 * 70)), "block"),
    "a flipped bit in the header": (changed("blocks", lambda old: raw.flip(old, 8 * 7)), "block"),
    "cut short": (changed("blocks", lambda old: old[:-10]), "block"),
    "cut in the header": (changed("blocks", lambda old: old[:20]), "block"),
    "empty": (changed("blocks", lambda _: b""), "block"),
    "another's block": (another, "block"),
    "no block": (changed("blocks", lambda _: None), "block"),
    "tokens that do not fit": (resealed(fewer_tokens), "block"),
    "no numbers": (resealed(no_numbers), "block"),
    "no embedding": (changed("embeddings", lambda _: None), "embedding"),
    "a flipped bit in the embedding": (changed("embeddings", lambda old: raw.flip(old, 99)), "embedding"),
    "an embedding cut short": (changed("embeddings", lambda old: old[:-5]), "embedding"),
    "an embedding of other length": (changed("embeddings", lambda _: floats(0, 1), seal=True), "embedding"),
    "an embedding that is no number": (
        changed("embeddings", lambda old: old[:-4] + floats(np.nan), seal=True),
        "embedding",
    ),
    "an embedding that is not of unit length": (
        changed("embeddings", lambda old: old[:-4] + floats(7), seal=True),
        "embedding",
    ),
    "no digest of the text": (of_text("digests", lambda _: None), "reference"),
    "a damaged digest of the text": (of_text("digests", lambda old: raw.flip(old, 3)), "reference"),
    "no place in its source": (no_member, "reference"),
    "no record of its source": (of_source(lambda _: None), "home"),
    "a damaged record of its source": (of_source(lambda old: raw.flip(old, 90)), "home"),
}
"""What is done to a memory whose text stays, and what is found to be damaged."""


@pytest.mark.parametrize("kind", MENDABLE)
def test_a_damaged_memory_is_found_and_computed_again(written: Place, kind: str) -> None:
    work, where = MENDABLE[kind]
    before = written.contents()
    work(written)
    report = verify(written, code=1)
    assert (where, BAD) in damage(report)
    assert {one["id"] for one in report["damage"]} <= {BAD, None}
    assert {one["source"] for one in report["damage"] if one["id"] == BAD} == {before.references[BAD].source}
    assert (report["blocks"], report["bad"]) == (6, int(where == "block"))
    assert verify(written, code=1) == report  # looking changes nothing
    repair = verify(written, "--repair")["repair"]
    assert repair["recomputed"] == {str(BAD): 6}
    assert (repair["dropped"], repair["left"]) == ([], [])
    assert verify(written)["damage"] == []
    after = written.contents()
    assert before.texts[BAD] == after.texts[6]
    assert set(after.texts) == {0, 1, 3, 4, 5, 6}
    for id in (0, 1, 3, 4, 5):
        assert after.blocks[id] == before.blocks[id]
    payload = slice(block.HEADER_BYTES, None)
    assert after.blocks[6][payload] == before.blocks[BAD][payload]
    assert verify(written, "--repair")["repair"] == {"quarantined": [], "recomputed": {}, "dropped": [], "left": []}
    assert written.contents() == after


LOST: dict[str, Work] = {
    "a flipped bit": changed("references", lambda old: raw.flip(old, 100)),
    "cut short": changed("references", lambda old: old[:-3]),
    "no list": changed("references", lambda _: b"{}", seal=True),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_memory_without_its_text_is_forgotten_only_where_that_is_asked_for(written: Place, kind: str) -> None:
    before = written.contents()
    LOST[kind](written)
    assert damage(verify(written, code=1)) >= {("reference", BAD)}
    result = written.m3("verify")
    assert result.code == 1
    assert "the texts of 1 memories are lost" in result.out
    report = verify(written, "--repair", code=1)
    assert report["repair"]["dropped"] == []
    assert ("reference", BAD) in {(one["where"], one["id"]) for one in report["repair"]["left"]}
    assert verify(written, "--repair", "--drop")["repair"]["dropped"] == [BAD]
    verify(written)
    assert written.contents().texts == {id: text for id, text in before.texts.items() if id != BAD}
    assert written.m3("write", "facts", "--json").json["written"] == 1
    assert sorted(written.contents().texts.values()) == sorted(before.texts.values())


@pytest.mark.parametrize("database", ["members", "digests", "embeddings", "quarantine"])
def test_what_is_left_of_a_memory_that_is_not_there_goes_where_lost_texts_do(written: Place, database: str) -> None:
    before, id = written.contents(), raw.key_of(77)
    source, text = digest(before.references[BAD].source), digest("nobody's")
    key, value = {"members": (source, id), "digests": (text, raw.sealed("digests", text, id))}.get(database, (id, b"-"))
    raw.put(written, database, key, value)
    assert 77 in {one["id"] for one in verify(written, code=1)["damage"]}
    verify(written, "--repair", code=1)
    assert verify(written, "--repair", "--drop")["repair"]["dropped"] == [77]
    verify(written)
    assert written.contents() == before


def test_everything_at_once_and_answers_are_as_they_were(written: Place) -> None:
    def answer() -> tuple[str, list[str]]:
        said = written.m3("ask", QUESTION, "--json").json
        return said["answer"], sorted(memory["text"] for memory in said["memories"])

    expected, before = answer(), written.contents()
    for id, (database, work) in enumerate(
        [
            ("blocks", lambda old: raw.flip(old, 999)),
            ("blocks", lambda old: old[:70]),
            ("embeddings", lambda old: raw.flip(old, 77)),
            ("blocks", lambda _: None),
        ]
    ):
        changed(database, work, raw.key_of(id))(written)
    assert {one["id"] for one in verify(written, code=1)["damage"]} == {0, 1, 2, 3}
    result = written.m3("verify")
    assert result.code == 1
    for id in (0, 1, 3):
        assert f"block, memory {id} ({before.references[id].places[0].name}): " in result.out
    assert "`m3 verify --repair` computes these memories again from their texts" in result.out
    result = written.m3("verify", "--repair")
    assert result.code == 0, result
    assert "4 computed again under new ids" in result.out
    assert result.out.splitlines()[-1] == "the bank is sound"
    assert "Computing memories again" in result.err
    verify(written)
    assert answer() == expected
    assert sorted(written.contents().texts.values()) == sorted(before.texts.values())


def test_without_a_model_it_only_quarantines(written: Place) -> None:
    written.configure(model={"path": "./nowhere"})
    changed("blocks", lambda old: raw.flip(old, 800))(written)
    report = verify(written, "--repair", "--no-model", code=1)
    assert report["repair"]["quarantined"] == [BAD]
    assert report["repair"]["recomputed"] == {}
    assert written.m3("inspect", "--json").json["quarantined"] == 1
    assert BAD not in [one["id"] for one in written.m3("search", "ferry", "-k", 9, "--json").json]
    (left,) = verify(written, code=1)["damage"]
    assert left["what"].startswith("quarantined: block: ")
    assert "no such folder" in written.m3("verify", "--repair", "--json").complaint
    assert written.m3("forget", "--quarantined", "--json").json == {"forgotten": [BAD]}
    verify(written)
    assert written.m3("forget", "--quarantined", "--json").json == {"forgotten": []}


def test_another_model_is_refused_before_anything_is_changed(written: Place, tmp_path: Path) -> None:
    changed("blocks", lambda old: raw.flip(old, 800))(written)
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    path = Config.load(written.file, environ={}).model.path
    written.configure(model={"path": str(tmp_path / "other")})
    assert "was written by another model" in written.m3("verify", "--repair", "--json").complaint
    written.configure(model={"path": path}, embedder={"salt": "another"})
    assert "was written with another embedder" in written.m3("verify", "--repair", "--json").complaint
    assert written.m3("inspect", "--json").json["quarantined"] == 0


def test_how_to_repair_needs_repair(written_once: Place) -> None:
    for option in ("--no-model", "--drop"):
        assert written_once.m3("verify", option).complaint == f"m3: {option} is an option of --repair: give that, too"


def test_a_sound_bank(written_once: Place) -> None:
    contents = written_once.contents()
    report = verify(written_once)
    assert report == {
        "bank": str(written_once.bank),
        "clean": True,
        "blocks": 6,
        "good": 6,
        "bad": 0,
        "bytes": sum(map(len, contents.blocks.values())),
        "quarantined": 0,
        "cold": 0,
        "codecs": report["codecs"],
        "damage": [],
        "notes": [],
    }
    assert list(report["codecs"].values()) == [6]
    result = written_once.m3("verify")
    assert result.code == 0
    assert result.out.startswith(f"{written_once.bank}: 6 memories, 6 good, 0 bad (0 quarantined)")
    assert "Reading memories" in result.err


def test_no_bank(place: Place) -> None:
    for arguments in ([], ["--repair"]):
        assert place.m3("verify", *arguments).complaint == (
            f"m3: there is no bank at {place.bank}; make one with `m3 write`"
        )


def test_damaged_records_of_the_quarantine_hide_nothing(written: Place) -> None:
    for id in (1, BAD):
        changed("blocks", lambda old: raw.flip(old, 800), raw.key_of(id))(written)
    verify(written, "--repair", "--no-model", code=1)
    for id in (1, BAD):
        changed("quarantine", lambda old: raw.flip(old, 66), raw.key_of(id))(written)
    assert 1 in {one["id"] for one in verify(written, code=1)["damage"]}
    assert set(verify(written, "--repair")["repair"]["recomputed"]) == {"1", str(BAD)}
    verify(written)


class TestWhatCannotBeRepaired:
    def test_the_codec(self, written: Place) -> None:
        file = written.bank / "codec.safetensors"
        good = file.read_bytes()
        for content in (None, good[:-1], raw.flip(good, 8 * len(good) // 2)):
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            self.is_said(written, "codec", str(file))
        file.write_bytes(good)
        verify(written)

    def test_the_manifest(self, written: Place) -> None:
        good = raw.get(written, "meta", b"manifest")
        for value in (raw.flip(good, 300), raw.sealed("meta", b"manifest", b"[1]"), b""):
            raw.put(written, "meta", b"manifest", value)
            self.is_said(written, "manifest", str(written.bank))
            assert "restore the bank from a copy, or write it anew" in written.m3("search", "why").complaint
        raw.put(written, "meta", b"manifest", good)
        verify(written)

    def is_said(self, place: Place, where: str, name: str) -> None:
        changed("embeddings", lambda old: raw.flip(old, 77))(place)  # which is found all the same
        report = verify(place, code=1)
        assert damage(report) >= {(where, None), ("embedding", BAD)}
        assert name in next(one["what"] for one in report["damage"] if one["where"] == where)
        assert verify(place, "--repair", code=1)["repair"]["recomputed"] == {}
        result = place.m3("verify", "--repair")
        assert result.code == 1
        assert "cannot be repaired: restore it from a copy, or write the bank anew" in result.out
        changed("embeddings", lambda old: raw.flip(old, 77))(place)


class TestIndex:
    def test_missing_damaged_or_foreign_it_is_noted(self, written: Place) -> None:
        file = written.bank / "index"
        good = file.read_bytes()
        config = Config.load(written.file, environ={})
        assembly.make_index(config, assembly.open_embedder(config).dim).save(file)
        foreign = file.read_bytes()
        for content in (None, good[:-1], b"", raw.flip(good, 1000), foreign):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            (note,) = verify(written)["notes"]
            assert str(file) in note
            assert "the index is rebuilt when the bank is opened" in note
            verify(written, "--repair")
            assert verify(written)["notes"] == []

    def test_behind_the_home_it_is_noted(self, written: Place) -> None:
        bank = assembly.open_bank(Config.load(written.file, environ={}))
        try:
            index = assembly.make_index(Config.load(written.file, environ={}), bank.manifest.dim)
            vectors = np.eye(2, bank.manifest.dim, dtype=np.float32)
            for ids, stored in bank.home.embeddings():
                index.add(ids[1:], stored[1:])
            index.add(as_ids([1000]), vectors[:1])
            assembly.bank_index(Config.load(written.file, environ={}), bank).save(index)
        finally:
            bank.close()
        (note,) = verify(written)["notes"]
        assert "lacks 1 memories and holds 1 that are not remembered" in note
        verify(written, "--repair")
        assert verify(written)["notes"] == []

    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8"])
    def test_with_the_vectors_of_other_texts_it_is_damaged(self, written: Place, dtype: str) -> None:
        written.configure(index={"dtype": dtype})
        config = Config.load(written.file, environ={})
        bank = assembly.open_bank(config)
        index = assembly.make_index(config, bank.manifest.dim)
        for ids, vectors in bank.home.embeddings():
            index.add(ids, vectors[[0, 3, 2, 1, 4, 5]])
        assembly.bank_index(config, bank).save(index)
        bank.close()
        assert damage(verify(written, code=1)) == {("index", 1), ("index", 3)}
        assert verify(written, "--repair")["repair"]["recomputed"] == {}
        verify(written)
        assert written.m3("search", QUESTION, "-k", 1, "--json").json[0]["source"] == "facts/lamp.txt"

    def test_many_equal_vectors_are_none_of_other_texts(self, place: Place) -> None:
        place.text("corpus.jsonl", records(f"Tick tock goes it {'!' * n}." for n in range(1, 40)))
        place.m3("write", "corpus.jsonl", "--json")
        contents = place.contents()
        assert len(set(contents.embeddings.values())) < 3 < 20 < len(contents.embeddings)
        assert verify(place)["damage"] == []


# A process that writes and forgets until it is told to end.
WRITER = """
import sys, threading, time
from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.memory.block import as_ids
from m3runtime.writing.encoding import Group
from m3runtime.runtime import Runtime
from m3runtime.documents.reference import Place, Reference

config = Config.load("m3.yaml", environ={})
adapter = assembly.open_adapter(config)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
with Runtime.open(config) as runtime:
    number = 0
    while not ended.is_set():
        texts = [f"The keeper of lamp {number + i} rests." for i in range(3)]
        places = (Place("log", 0, 1),)
        references = [Reference(text, adapter.count_tokens(text), places=places) for text in texts]
        first = runtime.bank.home.next_id()
        group = Group(runtime.bank, as_ids(range(first, first + 3)), references)
        group.encode(adapter, 3)
        group.embed(runtime.retriever.embedder)
        group.commit()
        runtime.retriever.index.add(group.ids, group.vectors)
        runtime.forget(group.ids[:2].tolist())
        time.sleep(0.01)  # the cores are wanted by those who read
        number += 3
        if number == 30:
            print("ready", flush=True)
"""


@contextmanager
def writing(place: Place) -> Iterator[None]:
    with Program(WRITER, folder=place.folder) as process:
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()
        assert process.wait() == 0


def test_beside_a_writer_others_read_and_no_other_writes(written: Place) -> None:
    before = written.contents()
    written.text("more.txt", "A glacier creaks above Tannhollow.")
    with writing(written):
        for _ in range(3):
            report = verify(written)
            assert report["blocks"] >= 6
        assert written.m3("search", QUESTION, "-k", 1, "--json").json[0]["source"] == "facts/lamp.txt"
        assert written.m3("ask", QUESTION, "--json").json["memories"]
        assert written.m3("chat", "--json", stdin=QUESTION).json["memories"]
        assert written.m3("inspect", "--json").json["memories"] >= 6
        for command in (["write", "more.txt"], ["forget", 1], ["verify", "--repair"]):
            line = written.m3(*command).complaint
            assert str(written.bank) in line
            assert "is open for writing already" in line
    assert before.texts.items() < written.contents().texts.items()
    assert verify(written)["notes"] == []


class TestServing:
    """Damaged records while memories are recalled."""

    DAMAGE = (
        changed("references", lambda old: raw.flip(old, 100)),
        changed("embeddings", lambda old: raw.flip(old, 100)),
        changed("embeddings", lambda old: old[:-4] + floats(np.nan), seal=True),
        changed("embeddings", lambda _: None),
        resealed(no_numbers),
    )

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("work", DAMAGE)
    def test_recall_goes_on_without_the_memory(self, written: Place, work: Work, read_only: bool) -> None:
        written.configure(recall={"min_score": -1})
        config = Config.load(written.file, environ={})
        text = written.contents().texts[BAD]
        work(written)
        (written.bank / "index").unlink()  # so that embeddings are read
        with Runtime.open(config, read_only=read_only) as runtime, runtime.stream() as stream:
            for _ in range(2):
                recalled = stream.recall(text)
                assert len(recalled) >= 2
                assert BAD not in recalled.ids
            assert set(runtime.bank.home.quarantined()) == (set() if read_only else {BAD})
        if not read_only:
            assert BAD not in [one["id"] for one in written.m3("search", text, "-k", 9, "--json").json]
        assert BAD in {one["id"] for one in verify(written, code=1)["damage"]}

    def test_what_is_damaged_can_be_forgotten(self, written: Place) -> None:
        changed("references", lambda old: raw.flip(old, 100))(written)
        assert written.m3("forget", BAD, "--json").json == {"forgotten": [BAD]}
        verify(written)
        assert written.m3("write", "facts", "--json").json["written"] == 1
        changed("references", lambda old: raw.flip(old, 100), raw.key_of(6))(written)
        with Runtime.open(Config.load(written.file, environ={})) as runtime:
            assert runtime.forget([6, 77]) == 1
        verify(written)


COUNT = GROUP + 6


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> Place:
    """A bank of which every second block is damaged."""
    place = new_place(tmp_path_factory.mktemp("damaged"))
    place.configure(memory={"layers": [0]}, embedder={"dim": 32})
    place.text("corpus.jsonl", records(f"Keeper {n} lit it on day {n * 37 % 1000}." for n in range(2 * COUNT)))
    assert place.m3("write", "corpus.jsonl", "--json").json["written"] == 2 * COUNT
    with raw.records(place, "blocks") as (txn, _):
        for id in range(0, 2 * COUNT, 2):
            key = raw.key_of(id)
            value = txn.get(key)
            assert value is not None
            txn.put(key, raw.flip(bytes(value), 8 * 100 + id))
    return place


def copied(place: Place, folder: Path) -> Place:
    shutil.copytree(place.folder, folder)
    return Place(folder)


def texts(place: Place) -> list[str]:
    """All texts that are remembered, those of quarantined memories with them."""
    bank = assembly.open_bank(Config.load(place.file, environ={}), read_only=True)
    try:
        ids = np.union1d(bank.home.ids(), as_ids(list(bank.home.quarantined())))
        found = bank.home.references(ids)
        assert all(
            bank.home.find([one.text], [one.heading]) == [id]
            for id, one in zip(ids.tolist(), found, strict=True)
            if one
        )
        return sorted(one.text for one in found if one is not None)
    finally:
        bank.close()


def test_a_repair_that_is_killed_loses_nothing(damaged: Place, nursery: Nursery, tmp_path: Path) -> None:
    repair, expected = ("verify", "--repair", "--json"), texts(damaged)
    place = copied(damaged, tmp_path / "undisturbed")
    code, (phases, end, _) = nursery.run(place, None, arguments=repair)
    assert code == 0, errors(place)
    begins = [phases[name] for name in ("repair", "computing", "index")]
    random = Random(4)
    for number, moment in enumerate(
        random.randrange(*bounds) for bounds in zip(begins, [*begins[1:], end], strict=True)
    ):
        place = copied(damaged, tmp_path / str(number))
        for delay in (None, random.random() ** 3 * 0.1):  # a moment may be within a call, too
            code, _ = nursery.run(place, moment, arguments=repair, delay=delay)
            assert code in ((-signal.SIGKILL,) if delay is None else (0, -signal.SIGKILL)), errors(place)
            assert texts(place) == expected
        verify(place, "--repair")
        assert sorted(place.contents().texts.values()) == expected
