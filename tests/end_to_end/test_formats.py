"""A folder of files in all formats, broken ones among them, becomes a bank that cites pages, sheets and rows."""

from tests.core.test_readers import BROKEN, GOOD
from tests.end_to_end.commands import Place


def test_forty_files(place: Place) -> None:
    place.configure(memory={"layers": [0]}, codec={"kind": "raw"})
    (place.folder / "docs").mkdir()
    for name, (make, _) in (GOOD | BROKEN).items():
        make(place.folder / "docs" / name)
    result = place.m3("write", "docs", "--json").json
    assert sorted(result["unread"]) == sorted(f"docs/{name}" for name in BROKEN)
    assert sorted(result["sources"]["new"]) == sorted(f"docs/{name}" for name in GOOD)
    sources = {source for one in place.contents().references.values() for source in one.sources}
    assert sorted(sources) == sorted(f"docs/{name}" for name in GOOD)
    (found,) = place.m3("search", "The tower of Harrowfen was built by seven masons", "-k", "1", "--json").json
    assert found["places"][0]["metadata"]
    assert ", page 4" in place.m3("search", "The tower of Harrowfen was built", "-k", "5").out
    assert "files: " in (again := place.m3("write", "docs")).out
    for name in BROKEN:
        assert f"not read: docs/{name}" in again.err
