"""Tags: metadata that files get when they are written, and that searches and answers are filtered by."""

import json

import pytest

from tests.end_to_end.commands import Place

LAMP, FERRY = "The lamp burns oil.", "The ferry sails on Monday."


@pytest.fixture
def docs(place: Place) -> Place:
    place.configure(memory={"reference_tokens": 40})
    place.text("docs/lamp.txt", LAMP)
    place.text("docs/ferry.txt", FERRY)
    assert place.m3("write", "docs/lamp.txt", "--tag", "lang=en", "--tag", "year=2019").code == 0
    assert place.m3("write", "docs").code == 0
    return place


def tags(place: Place) -> dict[str, dict[str, str]]:
    return {one.source: dict(one.metadata) for each in place.contents().references.values() for one in each.places}


def found(place: Place, *where: str) -> set[str]:
    options = [part for one in where for part in ("--where", one)]
    return {one["text"] for one in place.m3("search", "lamp", "-k", 9, *options, "--json").json}


def test_files_keep_their_tags_until_they_get_others(docs: Place) -> None:
    assert tags(docs) == {"docs/lamp.txt": {"lang": "en", "year": "2019"}, "docs/ferry.txt": {}}
    before = docs.contents()
    docs.text("docs/lamp.txt", f"{LAMP}\n")  # changed
    assert docs.m3("write", "docs").code == 0
    assert tags(docs)["docs/lamp.txt"] == {"lang": "en", "year": "2019"}
    report = docs.m3("write", "docs", "--tag", "lang=de", "--json").json
    assert (report["written"], report["sources"]["changed"]) == (0, ["docs/ferry.txt", "docs/lamp.txt"])
    assert tags(docs) == {"docs/lamp.txt": {"lang": "de"}, "docs/ferry.txt": {"lang": "de"}}
    assert docs.contents().blocks == before.blocks  # no memory was computed anew
    assert docs.m3("write", "docs", "--json").json["sources"]["changed"] == []
    (docs.folder / "docs/lamp.txt").rename(docs.folder / "docs/old.txt")
    assert docs.m3("write", "docs", "--json").json["sources"]["renamed"] == {"docs/old.txt": "docs/lamp.txt"}
    assert tags(docs)["docs/old.txt"] == {"lang": "de"}
    assert docs.m3("write", "docs", "--no-tags").code == 0
    assert tags(docs) == {"docs/old.txt": {}, "docs/ferry.txt": {}}


def test_a_search_and_an_answer_are_filtered(docs: Place) -> None:
    assert found(docs) == {LAMP, FERRY}
    assert found(docs, "lang=en") == found(docs, "lang=[en, de]", "year={at_least: 2019}") == {LAMP}
    assert found(docs, "lang=de") == found(docs, "lang=en", "year={at_most: 2018}") == set()
    assert found(docs, "source=docs/ferry.txt") == {FERRY}
    docs.configure(recall={"where": {"source": {"prefix": "docs/f"}}})
    assert found(docs) == {FERRY}
    assert found(docs, "lang=en") == set()
    docs.configure(recall={"where": {"year": {"at_least": 2000}}, "min_score": -1})
    answer = docs.m3("ask", "When does the ferry sail?", "--set", "generate.max_new_tokens=2", "--json").json
    assert [one["text"] for one in answer["memories"]] == [LAMP]
    answer = docs.m3("ask", "ferry", "--where", "lang=xx", "--set", "generate.max_new_tokens=2", "--json").json
    assert (answer["memories"], answer["found"]) == ([], False)
    shown = docs.m3("ask", "ferry", "--where", "lang=xx", "--set", "generate.max_new_tokens=2")
    assert "nothing was recalled" in shown.err
    bare = docs.m3("ask", "ferry", "--no-memory", "--set", "generate.max_new_tokens=2")
    assert "nothing was recalled" not in bare.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("write", "docs", "--tag", "lang"), "--tag lang"),
        (("write", "docs", "--tag", "expires=2030-01-01"), "expires"),
        (("write", "docs", "--tag", "a=1", "--tag", "a=2"), "twice"),
        (("write", "docs", "--tag", "a=1", "--no-tags"), "--no-tags"),
        (("search", "lamp", "--where", "lang"), "--where lang"),
        (("search", "lamp", "--where", "year={above: 1}"), "at_least"),
        (("search", "lamp", "--set", "recall.where=en"), "recall.where"),
    ],
)
def test_a_mistake_is_one_line(place: Place, arguments: tuple[str, ...], named: str) -> None:
    place.text("docs/lamp.txt", LAMP)
    assert named in place.m3(*arguments).complaint


def test_metadata_fields_of_json_lines_are_filtered_by(place: Place) -> None:
    lines = [{"text": LAMP, "kind": "light", "stars": 4}, {"text": FERRY, "kind": "ship"}]
    place.text("all.jsonl", "".join(json.dumps(one) + "\n" for one in lines))
    place.configure(documents={"metadata_fields": ["kind", "stars"]})
    assert place.m3("write", "all.jsonl").code == 0
    assert found(place, "kind=ship") == {FERRY}
    assert found(place, "stars={at_least: 3.5}") == {LAMP}
