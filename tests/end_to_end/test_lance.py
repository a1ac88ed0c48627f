"""Commands on a bank whose home and index are a Lance table."""

from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("lance")

from m3runtime import assembly
from m3runtime.config.schema import Config
from tests.end_to_end.commands import Place, Result, records
from tests.end_to_end.conftest import NewPlace

COUNT = 70
SECRET = "Zephyrine kept the seventh key."


def erased(result: Result) -> int:
    """The memories that an erasure tells of."""
    return int(result.json["erased"]["memories"])


@pytest.fixture
def place(tmp_path: Path, new_place: NewPlace) -> Place:
    place = new_place(tmp_path / "place")
    place.configure(
        memory={"layers": [0]},
        tiers=[{"kind": "pinned", "capacity": "1MiB"}, {"kind": "m3backends.lance.home:LanceHome"}],
        index={"kind": "m3backends.lance.index:LanceIndex"},
    )
    place.text("corpus.jsonl", records(f"Keeper {n} lit lamp {n * 37} in the tower." for n in range(COUNT)))
    return place


def test_a_bank_is_written_searched_changed_and_erased(place: Place) -> None:
    assert place.m3("write", "corpus.jsonl", "--json").json["written"] == COUNT
    place.text("secret.txt", SECRET)
    assert place.m3("write", "secret.txt", "--json").json["written"] == 1
    assert place.m3("write", "corpus.jsonl", "secret.txt", "--json").json["written"] == 0
    [first, *_] = place.m3("search", SECRET, "--json").json
    assert first["text"] == SECRET
    assert place.m3("verify", "--json").code == 0
    with closing(assembly.open_bank(Config.load(place.file, environ={}))) as bank:
        bank.home.reserve(50)  # as a writer does that is killed then
    assert erased(place.m3("forget", "secret.txt", "--erase", "--json")) == 1
    files = [file for file in place.bank.rglob("*") if file.is_file()]
    assert not [file for file in files if SECRET[:20].encode() in file.read_bytes()]
    assert SECRET not in str(place.m3("search", SECRET, "--json").json)
    place.text("corpus.jsonl", records(f"Keeper {n} lit lamp {n * 37} in the tower." for n in range(1, COUNT + 1)))
    report = place.m3("write", "corpus.jsonl", "--json").json
    assert report["written"] == 1
    assert erased(place.m3("compact", "--json")) == 1
    assert place.m3("verify", "--json").code == 0
    assert place.m3("ask", "Which lamp did keeper 9 light?", "--json").code == 0
