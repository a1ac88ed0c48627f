"""Last days: nothing is recalled after them, by whatever process, and every write forgets what has expired."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents import expiry
from m3runtime.documents.document import Document
from m3runtime.documents.survey import Reading
from m3runtime.recall.recalled import Recalled
from m3runtime.runtime import Runtime
from m3runtime.writing import following
from m3runtime.writing.mirror import Mirror, MirrorReport
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import Place

NINE, TWELVE = "The old mill of Tannhollow has nine sails.", "The harbour lamp of Uskerfold burns walnut oil."
SHARED = "A keeper trims the wick of it at dusk."
FAR = "9000-01-01"


def ahead(days: int) -> str:
    return (datetime.now(UTC).date() + timedelta(days)).isoformat()


def config(place: Place) -> Config:
    return Config.load(place.file, environ={}, overrides={"recall.refresh": "null"})


def texts(place: Place) -> set[str]:
    return set(place.contents().texts.values())


@pytest.fixture
def docs(place: Place) -> Place:
    """One file for ever, and one until the last day of 9000: both have one text in common."""
    place.configure(memory={"reference_tokens": 40})
    place.text("docs/a.txt", f"{NINE}\n\n{SHARED}")
    place.text("docs/b.txt", f"{TWELVE}\n\n{SHARED}")
    assert place.m3("write", "docs/a.txt", "--expires", FAR).code == 0
    assert place.m3("write", "docs").code == 0  # which leaves last days as they are
    return place


class Clock:
    """A date that a test sets."""

    day = FAR

    def __call__(self) -> str:
        return self.day


def test_a_running_process_recalls_nothing_after_its_last_day(docs: Place) -> None:
    clock = Clock()
    with Runtime.open(config(docs), read_only=True, today=clock) as runtime:
        stream = runtime.stream()

        def recalled(text: str) -> Recalled:
            found = stream.recall(text)
            assert {match.id for match in runtime.search([text])[0]} == set(found.ids)
            return found

        before = recalled(f"{NINE} {SHARED}")
        assert {one.text for one in before.references} >= {NINE, SHARED}
        (id,) = (one.id for one in runtime.search([NINE], 1)[0])
        assert id in runtime.fetch([id], before.dtype)
        clock.day = "9000-01-02"
        after = recalled(f"{NINE} {SHARED}")
        assert NINE not in {one.text for one in after.references}
        shared = [one for one in after.references if one.text == SHARED]
        assert [place.source for one in shared for place in one.places] == ["docs/b.txt"]
        assert runtime.fetch([id], before.dtype) == {}
        assert runtime.references([id]) == [None]
        assert id in runtime.bank.home.ids()  # a process that writes forgets it
    with Runtime.open(config(docs), read_only=True, today=clock) as runtime:
        assert id not in runtime.retriever.index.ids()
        assert NINE not in {one.text for one in runtime.stream().recall(NINE).references}


def test_a_write_forgets_first_what_has_expired(docs: Place) -> None:
    mirror = Mirror(config(docs), Reading(), today=lambda: "9000-01-02")
    docs.text("docs/a.txt", "Another text, which expired with its file.")
    report = mirror.write([docs.folder / "docs/b.txt"])
    assert (report.expired, report.written) == (1, None)
    assert texts(docs) == {TWELVE, SHARED}
    survey = mirror.survey([docs.folder / "docs"])
    assert (survey.is_in_step, survey.expired) == (True, ["docs/a.txt"])
    found = docs.m3("write", "docs", "--expires", "never", "--json").json
    assert found["sources"]["changed"] == ["docs/a.txt"]
    assert "Another text, which expired with its file." in texts(docs)
    mirror.close()


def test_forgetting_and_erasing_what_has_expired(docs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert docs.m3("forget", "--expired", "--json").json == {"forgotten": []}
    assert docs.m3("inspect", "--json").json["expiring"] == {"memories": 2, "next": FAR, "expired": 0}
    assert f"  next: {FAR}\n" in docs.m3("inspect").out
    monkeypatch.setattr(expiry, "today", lambda: "9000-01-02")
    assert docs.m3("inspect", "--json").json["expiring"] == {"memories": 0, "next": None, "expired": 1}
    assert docs.m3("verify", "--json").json["clean"]
    assert docs.m3("export", "all.jsonl").code == 0
    exported = (docs.folder / "all.jsonl").read_text()
    assert NINE not in exported
    assert "docs/a.txt" not in exported
    done = docs.m3("forget", "--expired", "--erase", "--json").json
    assert (len(done["forgotten"]), done["erased"]["memories"]) == (1, 1)
    assert NINE.encode() not in (docs.bank / "home/data.mdb").read_bytes()
    assert texts(docs) == {TWELVE, SHARED}
    assert docs.m3("inspect", "--json").json["expiring"] == {"memories": 0, "next": None, "expired": 0}


@pytest.mark.parametrize("wrong", ["soon", "2020-01-01", "90"])
def test_what_is_no_last_day(docs: Place, wrong: str) -> None:
    assert docs.m3("write", "docs", "--expires", wrong).complaint.startswith("m3: --expires ")


def test_a_duration_counts_from_the_write_that_reads_the_file(docs: Place) -> None:
    def days() -> tuple[str, str]:
        return expires(docs, "docs/a.txt"), expires(docs, "docs/b.txt")

    report = docs.m3("write", "docs", "--expires", "90d", "--json").json
    assert report["written"] == 0  # nothing is encoded again
    assert days() == (ahead(90), ahead(90))
    assert docs.m3("write", "docs", "--expires", "200d", "--json").json["sources"]["changed"] == []
    docs.text("docs/b.txt", TWELVE)
    docs.m3("write", "docs", "--expires", "200d")
    assert days() == (ahead(90), ahead(200))
    docs.m3("write", "docs", "--expires", "never")
    assert days() == ("", "")


def expires(place: Place, source: str) -> str:
    days = {one.expires for reference in place.contents().references.values() for one in reference.places_in(source)}
    (day,) = days
    return day


def test_records_have_last_days_of_their_own(place: Place) -> None:
    place.configure(documents={"expires_field": "until"})
    lines: list[dict[str, Any]] = [
        {"text": NINE, "until": ahead(3)},
        {"text": TWELVE, "until": "2020-01-01"},
        {"text": SHARED, "until": None},
        {"text": "Never read.", "until": "someday"},
        {"text": "A heron nests behind the abbey.", "until": f"{ahead(1)}T08:00:00Z"},
    ]
    place.text("docs/a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    result = place.m3("write", "docs", "--expires", "2d")
    assert "a.jsonl, line 4: 'until' must be a date such as 2027-01-31, not 'someday'" in result.err
    found = {one.text: one.places[0].expires for one in place.contents().references.values()}
    assert found == {NINE: ahead(2), SHARED: ahead(2), "A heron nests behind the abbey.": ahead(0)}
    assert place.m3("write", "docs", "--expires", "never").code == 0
    found = {one.text: one.places[0].expires for one in place.contents().references.values()}
    assert found == {NINE: ahead(3), SHARED: "", "A heron nests behind the abbey.": ahead(0)}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_last_days_are_exported_and_imported(docs: Place, tmp_path: Path, suffix: str) -> None:
    before = docs.contents().references
    path = tmp_path / f"all{suffix}"
    assert docs.m3("export", path).code == 0
    docs.configure(bank="other")
    assert docs.m3("import", path).code == 0
    assert set(docs.contents().references.values()) == set(before.values())


def test_what_has_expired_is_not_imported(place: Place) -> None:
    lines = [
        {"text": NINE, "places": [{"source": "a", "start": 0, "end": 1, "metadata": {"expires": "2020-01-01"}}]},
        {"text": TWELVE, "places": [{"source": "a", "start": 0, "end": 1, "metadata": {"expires": ahead(1)}}]},
    ]
    place.text("in.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert place.m3("import", "in.jsonl").code == 0
    assert texts(place) == {TWELVE}
    place.text("bad.jsonl", json.dumps(lines[0]).replace("2020-01-01", "soon"))
    assert "bad.jsonl, record 1: expires must be a date" in place.m3("import", "bad.jsonl").complaint


def test_an_interrupted_or_partial_change_keeps_the_last_day(docs: Place) -> None:
    ids = {reference.text: id for id, reference in docs.contents().references.items()}
    assert docs.m3("forget", str(ids[NINE])).code == 0  # its file has no state any more
    docs.text("docs/a.txt", f"{NINE}\n\n{SHARED}\n\nA third text of the same file.")
    assert docs.m3("write", "docs").code == 0
    assert expires(docs, "docs/a.txt") == FAR


def test_a_document_of_a_library_has_its_own(docs: Place) -> None:
    settings = config(docs)
    adapter = assembly.open_adapter(settings)
    document = Document("notes", "A text of another program.", {"expires": ahead(5)})
    Writer(settings, adapter, assembly.open_embedder(settings)).write([document])
    adapter.close()
    assert expires(docs, "notes") == ahead(5)
    assert docs.m3("inspect", "--json").json["expiring"]["next"] == ahead(5)


def test_folders_that_are_followed_expire_at_the_end_of_the_day(docs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(following, "_PATIENCE", 0.05)
    with closing(Mirror(config(docs), Reading(), today=clock)) as mirror:
        reports = following.follow(mirror, [docs.folder / "docs"])
        docs.text("docs/c.txt", "A new text, so that there is something to report.")
        assert isinstance(next(reports), MirrorReport)
        clock.day = "9000-01-02"
        report = next(reports)
        assert isinstance(report, MirrorReport)
        assert report.expired == 1
    assert NINE not in texts(docs)
