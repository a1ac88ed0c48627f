"""``m3 write`` keeps a bank in step with its files, and ``m3 forget`` takes files, folders and patterns."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from m3runtime.config.schema import Config
from m3runtime.documents.sources import SourceNames, is_within
from m3runtime.memory.block import as_ids
from m3runtime.runtime import Runtime
from tests.end_to_end.commands import Place
from tests.end_to_end.nursery import Nursery

NINE, TWELVE = "The old mill of Tannhollow has nine sails.", "The old mill of Tannhollow has twelve sails."
SHARED = "A keeper trims the harbour lamp at dusk."


def write(place: Place, *arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = place.m3("write", *arguments, "--json").json
    return report


def remembered(place: Place) -> dict[str, set[str]]:
    """Maps each text to the names of its places."""
    references = place.contents().references.values()
    return {one.text: {each.name for each in one.places} for one in references}


@pytest.fixture
def docs(place: Place) -> Place:
    place.configure(memory={"reference_tokens": 40})  # of which a sentence has more than half
    place.text("docs/a.txt", f"{NINE}\n\n{SHARED}")
    place.text("docs/deep/b.md", SHARED)
    place.text("docs/birds.jsonl", '{"text": "An owl guards the library.", "id": "owl"}\n{"text": "Herons nest."}\n')
    write(place, "docs")
    return place


def test_the_folder_of_all_is_written_without_the_bank_and_its_configuration(docs: Place) -> None:
    docs.text("bank/notes.txt", "A note about the bank itself.")
    docs.text("more.yaml", "lamp: It burns walnut oil.")
    report = write(docs, ".")
    assert report["sources"]["new"] == ["more.yaml"]
    assert report["skipped"] == []


def test_what_changed_is_replaced_and_what_did_not_stays(docs: Place) -> None:
    before = docs.contents()
    docs.text("docs/a.txt", f"{SHARED}\n\n{TWELVE}")
    report = write(docs, "docs")
    assert report["sources"] == {
        "new": [],
        "changed": ["docs/a.txt"],
        "renamed": {},
        "unchanged": ["docs/birds.jsonl", "docs/deep/b.md"],
        "gone": [],
    }
    assert (report["written"], report["forgotten"]) == (1, 1)
    after = docs.contents()
    assert set(after.texts.values()) == (set(before.texts.values()) - {NINE}) | {TWELVE}
    assert [one["text"] for one in docs.m3("search", "nine sails", "--json").json].count(NINE) == 0
    for id, text in before.texts.items():
        assert text == NINE or (after.texts[id], after.blocks[id]) == (text, before.blocks[id])
    assert docs.m3("verify", "--json").json["clean"]


def test_a_text_of_two_files_stays_until_both_are_gone(docs: Place) -> None:
    assert remembered(docs)[SHARED] == {"docs/a.txt", "docs/deep/b.md"}
    found = docs.m3("search", "keeper trims the lamp", "--json").json[0]
    assert [place["source"] for place in found["places"]] == ["docs/a.txt", "docs/deep/b.md"]
    assert docs.m3("forget", "docs/a.txt", "--json").json["forgotten"] == [0]
    assert remembered(docs)[SHARED] == {"docs/deep/b.md"}
    (docs.folder / "docs/deep/b.md").unlink()
    (docs.folder / "docs/a.txt").unlink()
    assert write(docs, "docs")["sources"]["gone"] == ["docs/deep/b.md"]
    assert SHARED not in remembered(docs)


def test_a_file_that_was_forgotten_is_remembered_when_its_folder_is_written_again(docs: Place) -> None:
    docs.m3("forget", "docs/a.txt")
    assert write(docs, "docs")["sources"]["new"] == ["docs/a.txt"]
    assert NINE in remembered(docs)


def test_a_renamed_file_keeps_ids_and_bytes_without_a_model(docs: Place) -> None:
    before = docs.contents()
    (docs.folder / "docs/a.txt").rename(docs.folder / "docs/deep/c.txt")
    docs.configure(model={"path": "./nowhere"})  # a change of settings: the model would be asked for
    assert "nowhere" in docs.m3("write", "docs").complaint
    docs.configure(model={"path": str(json.loads(before.manifest)["model_name"])})
    report = write(docs, "docs")
    assert report["sources"]["renamed"] == {"docs/deep/c.txt": "docs/a.txt"}
    assert report["sources"]["gone"] == []
    after = docs.contents()
    assert (after.blocks, after.texts, after.embeddings) == (before.blocks, before.texts, before.embeddings)
    assert remembered(docs)[SHARED] == {"docs/deep/c.txt", "docs/deep/b.md"}
    assert docs.m3("inspect", "--json").json["sources"].keys() == {
        "docs/birds.jsonl",
        "docs/deep/b.md",
        "docs/deep/c.txt",
    }


@pytest.mark.parametrize("change", ["nothing", "touched", "renamed", "gone"])
def test_what_needs_no_reading_needs_no_model(docs: Place, change: str) -> None:
    path = docs.folder / "docs/a.txt"
    match change:
        case "touched":
            os.utime(path)
        case "renamed":
            path.rename(path.with_name("z.txt"))
        case "gone":
            path.unlink()
    hidden = docs.folder / "hidden"
    names = ["transformers", "tests"]  # of the model and of the embedder
    for name in [*names, "torch"] if change in ("nothing", "touched", "renamed") else names:
        docs.text(f"hidden/{name}/__init__.py", f"raise SystemExit('{name} was imported')")
    result = docs.process("write", "docs", "--json", first=str(hidden))
    assert result.code == 0, (result.out, result.err)
    expected = {"nothing": 4, "touched": 4, "renamed": 4, "gone": 3}
    assert len(remembered(docs)) == expected[change]


def test_keeping_what_is_missing_and_only_looking(docs: Place) -> None:
    (docs.folder / "docs/a.txt").unlink()
    docs.text("docs/new.txt", "A glacier creaks above Tannhollow.")
    before = docs.contents()
    report = docs.m3("write", "docs", "--dry-run", "--json").json
    assert (report["sources"]["new"], report["sources"]["gone"]) == (["docs/new.txt"], ["docs/a.txt"])
    shown = docs.m3("write", "docs", "--dry-run").out
    assert "new  docs/new.txt\n" in shown
    assert "gone  docs/a.txt\n" in shown
    assert "files: 1 new, 2 unchanged, 1 gone; nothing was changed" in shown
    assert docs.contents() == before
    assert write(docs, "docs", "--keep-missing")["sources"]["gone"] == []
    assert NINE in remembered(docs)
    listed = docs.m3("write", "docs", "--verbose").out
    assert "gone  docs/a.txt\n" in listed
    assert "files: 3 unchanged, 1 gone; 1 memories forgotten" in listed


def test_however_a_path_is_given_it_is_the_same_source(docs: Place, tmp_path: Path) -> None:
    before = docs.contents()
    for given in ("docs", "./docs/", docs.folder / "docs", "../place/docs", "docs/../docs"):
        assert write(docs, given)["sources"]["unchanged"] == ["docs/a.txt", "docs/birds.jsonl", "docs/deep/b.md"]
    moved = Place(tmp_path / "moved")
    shutil.copytree(docs.folder, moved.folder)
    assert write(moved, "docs")["written"] == 0
    assert moved.contents() == before


def test_forgetting_files_folders_patterns_and_records(docs: Place) -> None:
    for given, left in [
        ("docs/birds.jsonl:owl", {NINE, SHARED, "Herons nest."}),
        ("./docs/birds.jsonl", {NINE, SHARED}),
        (str(docs.folder / "docs/*.txt"), {SHARED}),
        ("docs/deep", set()),
    ]:
        assert docs.m3("forget", given).code == 0
        assert set(remembered(docs)) == left
    line = docs.m3("forget", "docs/deep").complaint
    assert "the bank remembers nothing from docs/deep" in line


def test_a_file_that_is_gone_and_written_by_its_name(docs: Place) -> None:
    (docs.folder / "docs/a.txt").unlink()
    line = docs.m3("write", "docs/a.txt").complaint
    assert line.endswith("neither a file nor a folder; `m3 forget docs/a.txt` forgets what the bank has of it")


def test_a_folder_whose_files_are_all_gone(docs: Place) -> None:
    shutil.rmtree(docs.folder / "docs")
    (docs.folder / "docs").mkdir()
    assert len(write(docs, "docs")["sources"]["gone"]) == 3
    assert remembered(docs) == {}
    assert "holds no text" in docs.m3("write", "docs").complaint


def test_a_file_that_the_walk_passes_over_is_looked_at_once_it_was_written(docs: Place) -> None:
    docs.text("docs/LICENSE", NINE.replace("nine", "three"))
    write(docs, "docs/LICENSE")
    docs.text("docs/LICENSE", NINE.replace("nine", "four"))
    assert write(docs, "docs")["sources"]["changed"] == ["docs/LICENSE"]
    assert NINE.replace("nine", "three") not in remembered(docs)


def test_other_ways_of_reading_replace_what_there_is(docs: Place) -> None:
    docs.text("docs/birds.jsonl", '{"text": "An owl guards the library.", "body": "Herons nest."}\n')
    write(docs, "docs")
    assert "An owl guards the library." in remembered(docs)
    for again in range(2):
        report = write(docs, "docs", "--text-field", "body")
        assert report["sources"]["changed"] == ["docs/birds.jsonl"] * (not again)
        assert remembered(docs).keys() == {NINE, SHARED, "Herons nest."}


def test_many_sources_are_listed_by_folder(place: Place) -> None:
    for number in range(30):
        place.text(f"docs/{'ab'[number % 2]}/{number:02}.txt", f"House {number} has {number} windows.")
    write(place, "docs")
    shown = place.m3("inspect").out
    assert "  docs/a/: 15 in 15 files\n  docs/b/: 15 in 15 files\n" in shown
    assert "00.txt" not in shown
    listed = [line.strip() for line in place.m3("inspect", "--all").out.splitlines() if ".txt: 1" in line]
    assert listed == sorted(listed)
    assert len(listed) == 30


class TestNames:
    def test_relative_to_the_folder_that_holds_the_bank(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "project/sub").mkdir(parents=True)
        names = SourceNames(tmp_path / "project/bank")
        for folder, given, name in [
            ("project", "a.txt", "a.txt"),
            ("project", "./sub/../a.txt", "a.txt"),
            ("project", ".", "."),
            ("project/sub", "../a.txt", "a.txt"),
            ("project/sub", "b.txt", "sub/b.txt"),
            (".", "other/c.txt", "../other/c.txt"),
        ]:
            monkeypatch.chdir(tmp_path / folder)
            assert names.name(given) == name
            assert names.path(name) == Path(os.path.abspath(given))  # noqa: PTH100
        assert names.name("/nowhere/a.txt") == "/nowhere/a.txt"

    def test_within(self) -> None:
        assert is_within("docs/a/b.txt", "docs")
        assert is_within("docs", "docs")
        assert is_within("a.txt", ".")
        assert is_within("/x/a.txt", "/")
        assert not is_within("docs2/a.txt", "docs")
        assert not is_within("../a.txt", ".")
        assert not is_within("/x/a.txt", ".")


def test_a_running_process_sees_what_another_changed(docs: Place, nursery: Nursery) -> None:
    config = Config.load(docs.file, environ={}, overrides={"recall.refresh": "0s"})
    with Runtime.open(config, read_only=True) as runtime:

        def found(text: str) -> dict[str, list[str]]:
            stream = runtime.stream()
            recalled = stream.recall(text)
            searched = {match.id for match in runtime.search([text])[0]}
            assert searched == set(recalled.ids)
            return {one.text: [place.source for place in one.places] for one in recalled.references}

        assert NINE in found("sails of the old mill")
        assert found(SHARED)[SHARED] == ["docs/a.txt", "docs/deep/b.md"]
        docs.text("docs/a.txt", f"{TWELVE}\n\n{SHARED}")
        (docs.folder / "docs/deep/b.md").rename(docs.folder / "docs/z.md")
        assert nursery.m3(docs, "write", "docs").code == 0
        sails = found("sails of the old mill")
        assert (TWELVE in sails, NINE in sails) == (True, False)
        assert sorted(found(SHARED)[SHARED]) == ["docs/a.txt", "docs/z.md"]
        assert nursery.m3(docs, "forget", "docs").code == 0
        assert found(SHARED) == {}
        assert not runtime.hierarchy.held(as_ids(range(9))).any()
        assert runtime.store.references() == {}


def test_a_running_process_looks_when_it_is_told_to(docs: Place, nursery: Nursery) -> None:
    config = Config.load(docs.file, environ={}, overrides={"recall.refresh": "null"})
    with Runtime.open(config, read_only=True) as runtime:
        assert runtime.search([SHARED])[0]
        assert nursery.m3(docs, "forget", "docs").code == 0
        assert runtime.search([SHARED])[0]
        runtime.refresh()
        assert not runtime.search([SHARED])[0]
