"""Files and records that cannot be read are left out and named, and the others are written."""

import os

from tests.end_to_end.commands import Place, records

LAMP, FERRY = "The harbour lamp burns walnut oil at dusk.", "The ferry to Brannoch does not sail on Tuesday."


def texts(place: Place) -> list[str]:
    return sorted(place.contents().texts.values())


def spoil(place: Place) -> None:
    """Make a folder of two files that can be read, and three things that cannot."""
    place.text("notes/lamp.txt", LAMP)
    place.text("notes/birds.jsonl", records([FERRY]) + '{"text": \n{"body": "none"}\n')
    place.text("notes/binary.txt", b"\x7fELF\0")
    place.text("notes/sheet.md", "Zwölf Boxkämpfer ".encode() + b"\xe4 x")
    os.mkfifo(place.folder / "notes" / "pipe.txt")


def test_a_folder_is_written_without_them(place: Place) -> None:
    spoil(place)
    result = place.m3("write", "notes")
    assert result.code == 0
    assert "2 memories written" in result.out
    assert texts(place) == [FERRY, LAMP]
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("not read: ")] == lines[-4:]
    for reason in (
        "notes/binary.txt is a binary file, not text",
        "notes/birds.jsonl, line 2 is not JSON",
        "notes/birds.jsonl, line 3 is not an object with a text in 'text'",
        "notes/sheet.md is a binary file, or damaged text: byte 19 is not UTF-8",
        "1 files were passed over, such as notes/pipe.txt",
    ):
        assert any(reason in line for line in lines), reason
    # They are named each time, and nothing is written twice.
    again = place.m3("write", "notes", "--json").json
    assert sorted(again["unread"]) == ["notes/binary.txt", "notes/birds.jsonl", "notes/sheet.md"]
    assert (again["written"], again["known"]) == (0, 2)


def test_a_file_with_bad_lines_is_read_once(place: Place) -> None:
    """Its state is remembered with the reasons, so that it costs no model to name them again."""
    place.text("notes/birds.jsonl", records([FERRY]) + '{"text": \n' * 120)
    first = [line for line in place.m3("write", "notes").err.splitlines() if line.startswith("not read: ")]
    for name in ("transformers", "torch", "tests"):
        place.text(f"hidden/{name}/__init__.py", f"raise SystemExit('{name} was imported')")
    result = place.process("write", "notes", first=str(place.folder / "hidden"))
    assert result.code == 0, result.err
    assert result.err.splitlines()[:3] == first[:3]
    assert first[2].startswith("not read: notes/birds.jsonl, line 4 is not JSON")
    report = place.m3("write", "notes/birds.jsonl", "--json")
    assert report.code == 1
    place.text("notes/birds.jsonl", records([LAMP]))
    again = place.m3("write", "notes", "--json").json
    assert (again["unread"], again["written"], texts(place)) == ({}, 1, [LAMP])


def test_a_named_file_that_cannot_be_read_shows_in_the_exit_status(place: Place) -> None:
    spoil(place)
    result = place.m3("write", "notes/lamp.txt", "notes/binary.txt")
    assert result.code == 1
    assert texts(place) == [LAMP]
    assert "not read: notes/binary.txt is a binary file" in result.err
    assert place.m3("write", "notes/birds.jsonl", "--json").code == 1
    assert texts(place) == [FERRY, LAMP]


def test_nothing_that_can_be_read(place: Place) -> None:
    spoil(place)
    complaint = place.m3("write", "notes/binary.txt", "notes/sheet.md").complaint
    assert "notes/binary.txt is a binary file, not text; and 1 more could not be read" in complaint
    assert not place.bank.exists()


def test_a_file_that_can_no_longer_be_read_is_remembered_as_it_was(place: Place) -> None:
    place.text("notes/lamp.txt", LAMP)
    place.text("notes/ferry.txt", FERRY)
    assert place.m3("write", "notes").code == 0
    place.text("notes/ferry.txt", b"\0")
    place.text("notes/lamp.txt", f"{LAMP} It is purple.")
    result = place.m3("write", "notes")
    assert result.code == 0
    assert "not read: notes/ferry.txt" in result.err
    assert texts(place) == [FERRY, f"{LAMP} It is purple."]
    assert "notes/ferry.txt is a binary file" in place.m3("write", "notes/ferry.txt").complaint


def test_a_picture_in_a_text_is_left_out_and_named(place: Place) -> None:
    picture = "iVBORw0KGgoAAAANSUhEUgAA" * 300
    place.text("notes/lamp.md", f"# Lamp\n\n![The lamp](data:image/png;base64,{picture})\n\n{LAMP}\n")
    result = place.m3("write", "notes")
    assert texts(place) == [f"# Lamp\n\n![The lamp]()\n\n{LAMP}"]
    assert "left out: notes/lamp.md: 7222 characters of base64 at 20" in result.err
