import pytest

from m3runtime.documents.reference import Reference


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("most", "read"),
    [
        (9, "Town > Ships > Heron\nIt is blue."),
        (8, "Town > Ships > Heron\nIt is blue."),
        (7, "Ships > Heron\nIt is blue."),
        (5, "Heron\nIt is blue."),
        (4, "Heron\nIt is blue."),
        (3, "It is blue."),
        (1, "It is blue."),
    ],
)
def test_first_titles_are_left_out_where_there_is_no_room(most: int, read: str) -> None:
    reference = Reference("It is blue.", 3, "Town > Ships > Heron")
    assert reference.headed_within(most, words) == read


def test_a_reference_without_heading_is_its_text() -> None:
    assert Reference("It is blue.", 3).headed_within(99, words) == "It is blue."
