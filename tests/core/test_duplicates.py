"""What several references say in the same sentences is recalled once, without loss, and cited from all of them."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.documents.reference import Place, Reference
from m3runtime.lab.evaluation.asking import searched
from m3runtime.lab.evaluation.world import make_world
from m3runtime.memory.block import as_ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.duplicates import Duplicates, sentences
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Batch
from tests.core.recalling import TEXTS, embedder_of, memories, open_runtime

TEXT = "The ferry sails on Tuesday.\nIt takes 35 minutes, and costs 4.50 crowns. Dogs travel free. Cars do not."
SAME = [
    TEXT.upper(),
    TEXT.replace("\n", " \n  "),
    TEXT.replace(" ", "\n", 5),
    f"- {TEXT.removesuffix('.')}",
    f"> {TEXT}",
    TEXT.replace("ferry", "**ferry**").replace("Dogs", "_Dogs_").replace("Tuesday", '"Tuesday"'),
    "Dogs travel free. Cars do not. It takes 35 minutes, and costs 4.50 crowns. The ferry sails on Tuesday.",
]
OTHER = [
    TEXT.replace("Tuesday", "Monday"),
    TEXT.replace("35", "36"),
    TEXT.replace("4.50", "450"),
    TEXT.replace("travel", "do not travel"),
    TEXT.replace("It takes 35 minutes, and costs 4.50 crowns. ", ""),
    "",
    "...",
]


def joined(texts: Sequence[str], most: int = 9) -> list[tuple[int, ...]]:
    """The numbers of these texts, the best first, as they are recalled."""
    matches = [Match(number, 0.9 - number / 100) for number in range(len(texts))]
    found = Duplicates(lambda ids: {id: Reference(texts[id], 1) for id in ids}).joined(matches, most)
    assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)
    return [(match.id, *match.stands_for) for match in found]


@pytest.mark.parametrize("other", SAME)
def test_form_makes_no_difference(other: str) -> None:
    assert joined([TEXT, other]) == [(0, 1)]


@pytest.mark.parametrize("other", OTHER)
def test_a_near_miss_is_recalled_too(other: str) -> None:
    assert joined([TEXT, other]) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("one", "other"),
    [("f'(x) = 2x", "f(x) = 2x"), ('a 5" pipe', "a 5' pipe"), ("z* = 3", "z = 3"), ("*p = 0", "p = 0"), ("10⁹", "109")],
)
def test_signs_that_are_not_in_pairs_make_a_difference(one: str, other: str) -> None:
    assert joined([f"Here is {one}.", f"Here is {other}."]) == [(0,), (1,)]


def test_signs_of_code_make_a_difference() -> None:
    code = "if x > 5:\n    total += read_file(name)\nreturn total"
    assert joined([code, code.replace(">", "<")]) == joined([code, code.replace("+=", "-=")]) == [(0,), (1,)]
    assert joined([code, code.replace("\n", " ")]) == [(0, 1)]


def test_near_misses_of_a_world_are_all_recalled() -> None:
    texts = make_world(5, references=60, questions=4, unanswerable=0).references
    assert joined(texts, len(texts)) == [(number,) for number in range(len(texts))]


def test_the_one_that_says_more_is_recalled_at_the_place_of_the_nearest() -> None:
    more = f"{TEXT} Bicycles neither."
    assert joined([TEXT, "another text", more]) == [(2, 0), (1,)]
    assert joined([more, TEXT, TEXT.lower()]) == [(0, 1, 2)]


def test_later_matches_take_the_places_that_are_free_and_are_cited_beyond() -> None:
    assert joined([TEXT, TEXT.upper(), "b", "c", TEXT.lower()], 2) == [(0, 1, 4), (2,)]


def test_an_id_without_text_is_a_match_of_its_own() -> None:
    found = Duplicates(lambda _: {}).joined([Match(1, 0.9), Match(2, 0.8)], 5)
    assert [match.id for match in found] == [1, 2]


@given(
    st.lists(st.lists(st.sampled_from(["One is red.", "Two are blue!", "Three?", "3 of 4."]), max_size=6), max_size=8)
)
def test_nothing_is_lost_and_nothing_comes_twice(parts: list[list[str]]) -> None:
    texts = [" ".join(part) for part in parts]
    groups = joined(texts)
    assert sorted(id for group in groups for id in group) == list(range(len(texts)))
    for first, *others in groups:
        assert set().union(*map(sentences, (texts[other] for other in others))) <= sentences(texts[first]).keys()
    firsts = [texts[first] for first, *_ in groups if texts[first]]
    assert not any(sentences(one) == sentences(other) for one, other in combinations(firsts, 2))


def test_copies_leave_room_for_other_texts_and_are_all_cited(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", lookahead_tokens=0) as runtime, runtime.stream() as stream:
        before = stream.recall(TEXTS[0])
        copies = add_copies(runtime, TEXTS[0], 40)
        found = stream.recall(f"{TEXTS[0]} ")
        assert found.ids[0] in {0, *copies}
        assert found.ids[1:] == before.ids[1:]
        assert {place.source for place in found.references[0].places} == {"words.txt", *map(str, copies)}
        (matches,) = runtime.search([TEXTS[0]])
        ((_, chosen),) = searched(runtime, [TEXTS[0]])
        assert list(chosen) == matches, "evaluations compare with what a recall reads"
        assert [match.id for match in matches] == list(found.ids)
        assert [one.places if one else () for one in runtime.cited(matches)] == [one.places for one in found.references]
        assert {match.id for match in runtime.search([TEXTS[0]], 41)[0]} == {0, *copies}

        runtime.forget([found.ids[0], copies[-1]])
        again = stream.recall(f"{TEXTS[0]}  ")
        assert again.ids[0] in {0, *copies} - {found.ids[0], copies[-1]}
        assert len(again.references[0].places) == 39


def test_copies_can_be_recalled_each(tmp_path: Path) -> None:
    with open_runtime(tmp_path / "bank", distinct=False) as runtime:
        copies = add_copies(runtime, TEXTS[0], 4)
        assert {match.id for match in runtime.search([TEXTS[0]])[0]} <= {0, *copies}


def add_copies(runtime: Runtime, text: str, count: int) -> list[int]:
    """References with the text in capitals, under a heading and in a source of their own each."""
    first = runtime.bank.home.next_id()
    ids = as_ids(range(first, first + count))
    every = memories()
    rows = [0] * count
    blocks = runtime.bank.blocks(ids, MemoryTensors(every.keys[rows], every.values[rows], every.tokens[rows]))
    copies = [
        Reference(text.upper(), 1, heading=str(id), places=(Place(str(id), 0, len(text)),)) for id in ids.tolist()
    ]
    vectors = np.repeat(embedder_of(runtime).embed_references([text]), count, axis=0)
    runtime.bank.home.commit(Batch(ids, blocks, copies, vectors))
    runtime.refresh()
    return ids.tolist()  # type: ignore[no-any-return]
