"""A bank whose references are only in its catalogue: written, asked, inspected, verified, forgotten and completed."""

from pathlib import Path
from typing import Any

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import FACTS, Place
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery
from tests.forked import run

QUESTION = "What does the harbour lamp of Uskerfold burn?"
COUNT = len(FACTS) + 1
# Imports once, and is killed twice.
KILL = """
import os, signal
from m3backends.lmdb.home import LmdbHome
from m3runtime.cli import main

def fill(*_):
    print("encoded", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

LmdbHome.fill = fill
for _ in range(2):
    child = os.fork()
    if not child:
        main()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def configured(place: Place, *, cold_start: bool) -> Place:
    place.configure(
        codec={"kind": "raw"},
        recall={"cold_start": cold_start, "chunk_tokens": 8, "lookahead_tokens": 3, "memories": 2, "min_score": -1},
        generate={"max_new_tokens": 40},
    )
    return place


@pytest.fixture
def cold(place: Place) -> Place:
    """A bank of `FACTS`, none of them encoded."""
    report = configured(place, cold_start=True).m3("write", place.facts(), "--catalogue", "--json").json
    assert (report["catalogued"], report["written"], report["known"], report["bytes"]) == (COUNT, 0, 0, 0)
    assert report["phases"]["model"] == report["phases"]["encode"] == 0
    return place


@pytest.fixture
def warm(tmp_path: Path, new_place: NewPlace) -> Place:
    """A bank of `FACTS`, all of them encoded."""
    place = configured(new_place(tmp_path / "warm"), cold_start=False)
    assert place.m3("write", place.facts(), "--json").json["written"] == COUNT
    return place


def counts(place: Place) -> tuple[int, int]:
    """References that are encoded, and cold ones."""
    facts = place.m3("inspect", "--json").json
    return facts["memories"], facts["cold"]


def answer(place: Place, question: str = QUESTION) -> Any:
    said = place.m3("ask", question, "--json").json
    return said["answer"], [(one["id"], one["text"]) for one in said["memories"]]


def test_a_cold_bank_answers_as_a_warm_one_does_and_remembers(cold: Place, warm: Place) -> None:
    assert counts(cold) == (0, COUNT)
    expected = answer(warm)
    assert answer(cold) == expected
    encoded, left = counts(cold)
    assert (encoded, left) == (len(expected[1]), COUNT - len(expected[1]))
    assert answer(cold) == expected
    assert counts(cold) == (encoded, left)
    for fact in ("When does the ferry sail?", "Who guards the library?", "What is in the loaves?", QUESTION):
        assert answer(cold, fact) == answer(warm, fact)
    verified = cold.m3("verify", "--json").json
    assert verified["clean"]
    assert (verified["good"], verified["cold"]) == counts(cold)


def test_without_a_cold_start_only_what_is_encoded_is_recalled(cold: Place) -> None:
    cold.configure(recall={"cold_start": False})
    assert cold.m3("ask", QUESTION, "--json").json["memories"] == []
    assert cold.m3("search", QUESTION, "--json").json == []
    assert counts(cold) == (0, COUNT)
    cold.configure(recall={"cold_start": True})
    assert cold.m3("search", QUESTION, "-k", 1, "--json").json[0]["text"].startswith("The harbour lamp")
    assert counts(cold) == (0, COUNT)  # a search encodes nothing
    assert len(answer(cold)[1]) > 0


def test_writing_completes_what_was_catalogued(cold: Place, warm: Place) -> None:
    answer(cold)
    encoded, left = counts(cold)
    again = cold.m3("write", "facts", "--catalogue", "--json").json
    assert (again["catalogued"], again["known"]) == (0, COUNT)
    report = cold.m3("write", "facts", "--json").json
    assert (report["written"], report["known"], report["catalogued"]) == (left, encoded, 0)
    assert report["bytes"] > 0
    assert counts(cold) == (COUNT, 0)
    mine, whole = cold.contents(), warm.contents()
    assert (mine.references, mine.embeddings, mine.next_id) == (whole.references, whole.embeddings, whole.next_id)
    assert mine.manifest == whole.manifest
    assert cold.m3("verify", "--json").json["clean"]
    assert answer(cold) == answer(warm)
    assert cold.m3("write", "facts", "--json").json["written"] == 0


def test_what_was_catalogued_and_never_recalled_is_written_to_the_same_bytes(cold: Place, warm: Place) -> None:
    assert cold.m3("write", "facts", "--json").json["written"] == COUNT
    assert cold.contents() == warm.contents()


def test_new_texts_are_written_beside_what_is_cold(cold: Place) -> None:
    cold.text("facts/more.txt", "The bell of the mill is rung at noon by a miller.")
    report = cold.m3("write", "facts/more.txt", "--json").json
    assert (report["written"], report["known"]) == (1, 0)
    assert counts(cold) == (1, COUNT)
    report = cold.m3("write", "facts").out
    assert f"{COUNT} memories written, 1 known already" in report
    cold.text("facts/bees.txt", "The bees of the abbey make heather honey.")
    report = cold.m3("write", "facts", "--catalogue").out
    assert f"1 references catalogued, {COUNT + 1} known already; files: 1 new, 6 unchanged; " in report


def test_what_is_cold_is_inspected_and_forgotten(cold: Place) -> None:
    shown = cold.m3("inspect", 0, "--json").json
    assert (shown["block"], shown["block_bytes"]) == ("cold", 0)
    assert shown["text"]
    assert f"; {COUNT} references are cold" in cold.m3("verify").out
    assert cold.m3("forget", 0, 1, "--json").json == {"forgotten": [0, 1]}
    assert counts(cold) == (0, COUNT - 2)
    assert shown["text"] not in [text for _, text in answer(cold)[1]]
    assert cold.m3("verify", "--json").json["clean"]


def test_a_catalogue_begins_with_the_codec_of_any_other_bank(place: Place, tmp_path: Path, new_place: NewPlace) -> None:
    places = place, new_place(tmp_path / "other")
    shown = []
    for one, extra in zip(places, (["--catalogue"], []), strict=True):
        one.configure(codec={"kind": "product", "key_bytes": 2, "value_bytes": 2})
        assert one.m3("write", one.facts(), *extra, "--json").code == 0
        shown.append(one.m3("inspect", "--json").json)
    assert shown[0]["codec"] == shown[1]["codec"]
    assert shown[0]["fingerprint"] == shown[1]["fingerprint"]
    place.configure(recall={"cold_start": True})
    assert answer(place) == answer(places[1])


def test_a_chat_encodes_what_it_recalls(cold: Place) -> None:
    said = cold.m3("chat", "--json", stdin=QUESTION + "\n").json
    assert {one["id"] for one in said["memories"]}
    assert counts(cold)[0] == len(said["memories"])


def test_a_cold_start_beside_a_writer_is_refused_in_a_line(cold: Place, nursery: Nursery) -> None:
    bank = assembly.open_bank(Config.load(cold.file, environ={}))
    try:
        for command in (["ask", QUESTION], ["chat"]):
            complaint = cold.m3(*command).complaint
            assert "is open for writing already" in complaint
            assert "recall.cold_start" in complaint
        cold.configure(recall={"cold_start": False})
        assert nursery.m3(cold, "ask", QUESTION, "--json").json["memories"] == []  # another process may read
    finally:
        bank.close()


def test_a_runtime_that_only_reads_encodes_nothing(cold: Place) -> None:
    with Runtime.open(Config.load(cold.file, environ={}), read_only=True) as runtime, runtime.stream() as stream:
        assert stream.recall(QUESTION).ids == ()
        assert runtime.search([QUESTION], k=1)[0]
    assert counts(cold) == (0, COUNT)


def test_killed_between_encoding_and_storing_it_is_still_cold(cold: Place, warm: Place) -> None:
    killed = run(KILL, "ask", QUESTION, folder=cold.folder)
    assert killed.returncode == 0, killed.stdout
    assert killed.stdout == "encoded\n" * 2
    assert counts(cold) == (0, COUNT)
    assert cold.m3("verify", "--json").json["clean"]
    assert answer(cold) == answer(warm)


def test_damage_to_what_is_cold_is_repaired(cold: Place) -> None:
    from tests.hostile import raw

    def spoil(value: bytes) -> bytes:
        return raw.flip(value, 70)

    raw.put(cold, "embeddings", raw.key_of(0), spoil(raw.get(cold, "embeddings", raw.key_of(0))))
    raw.put(cold, "cold", raw.key_of(1), spoil(raw.sealed("cold", raw.key_of(1), b"\0\0")))
    found = cold.m3("verify", "--json")
    assert found.code == 1
    assert cold.m3("verify", "--repair", "--json").code == 0
    assert cold.m3("verify", "--json").json["clean"]
    assert counts(cold) == (2, COUNT - 2)
