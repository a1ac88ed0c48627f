from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3backends.usearch.index import UsearchIndex
from m3runtime.errors import ConfigError, IndexFileError, InputError
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index
from m3runtime.testing.index import IndexContract, brute_force, unit_vectors


class TestFloat32(IndexContract):
    def make_index(self) -> Index:
        return UsearchIndex(dim=self.dim, dtype="f32")


class TestFloat16(IndexContract):
    score_tolerance = 1e-3

    def make_index(self) -> Index:
        return UsearchIndex(dim=self.dim)


class TestBfloat16(IndexContract):
    score_tolerance = 1e-2

    def make_index(self) -> Index:
        return UsearchIndex(dim=self.dim, dtype="bf16")


class TestInt8(IndexContract):
    score_tolerance = 5e-2

    def make_index(self) -> Index:
        return UsearchIndex(dim=self.dim, dtype="i8")


def test_graph_finds_nearly_everything_that_brute_force_finds() -> None:
    ids = np.arange(6_000, dtype=np.uint64)
    vectors = unit_vectors(len(ids), 32)
    index = UsearchIndex(dim=32, exact_below=100)
    index.add(ids, vectors)
    queries = unit_vectors(100, 32, seed=1)
    found, scores = index.search(queries, 5)
    hits = sum(
        len(set(row.tolist()) & set(brute_force(ids, vectors, query)[0][:5].tolist()))
        for row, query in zip(found, queries, strict=True)
    )
    assert hits > 0.9 * 500
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.fixture(scope="module")
def large() -> tuple[UsearchIndex, Embeddings]:
    vectors = unit_vectors(100_000, 8)
    index = UsearchIndex(dim=8, dtype="f32", connectivity=4, expansion_add=8)
    index.add(np.arange(len(vectors), dtype=np.uint64), vectors)
    return index, vectors


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2, 0.1, 0.5, 1])
def test_a_search_among_any_share_of_many_ids_is_brute_force(
    large: tuple[UsearchIndex, Embeddings], share: float
) -> None:
    index, vectors = large
    rng = np.random.default_rng(0)
    count = round(share * len(vectors))
    queries = unit_vectors(4, 8, seed=1)
    for passing in (rng.permutation(len(vectors))[:count], np.argsort(vectors @ queries[0])[:count]):
        ids = np.sort(passing).astype(np.uint64)
        found, scores = index.search_among(ids, queries, 5)
        for row, query in enumerate(queries):
            best, best_scores = brute_force(ids, vectors[ids], query)
            assert scores[row] == pytest.approx(best_scores[:5], abs=1e-5)
            assert len({*found[row].tolist()} - {*best[: 5 + 2].tolist()}) == 0


def test_graph_gives_as_many_as_asked_for_even_after_removals() -> None:
    ids = np.arange(500, dtype=np.uint64)
    index = UsearchIndex(dim=8, exact_below=0, expansion_search=4)
    index.add(ids, unit_vectors(500, 8))
    index.remove(ids[::2])
    found, _ = index.search(unit_vectors(3, 8, seed=1), 300)
    assert [sorted(row) for row in found.tolist()] == [ids[1::2].tolist()] * 3


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 30), max_size=8)), max_size=20))
def test_any_order_of_adding_and_removing(steps: list[tuple[bool, set[int]]]) -> None:
    vectors = unit_vectors(31, 4)
    index = UsearchIndex(dim=4, dtype="f32")
    held: set[int] = set()
    for adding, chosen in steps:
        ids = np.array(sorted(chosen), np.uint64)
        if adding:
            index.add(ids, vectors[ids])
            held |= chosen
        else:
            index.remove(ids)
            held -= chosen
        kept = np.array(sorted(held), np.uint64)
        assert index.ids().tolist() == kept.tolist()
        found, scores = index.search(vectors[:1], 5)
        expected, exact = brute_force(kept, vectors[kept], vectors[0])
        assert found[0].tolist() == expected[:5].tolist()
        assert scores[0].tolist() == pytest.approx(exact[:5].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "f8"}, {"dim": 0}, {"exact_below": -1}, {"connectivity": 1}, {"expansion_search": 0}],
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="index"):
        UsearchIndex(**{"dim": 4, **options})  # type: ignore[arg-type]


def test_unknown_dtype_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="f32, f16, bf16, i8"):
        UsearchIndex(dim=4, dtype="float")


def test_vectors_that_do_not_fit() -> None:
    index = UsearchIndex(dim=4)
    one = np.array([1], np.uint64)
    with pytest.raises(InputError, match=r"\(1, 5\)"):
        index.add(one, unit_vectors(1, 5))
    with pytest.raises(InputError, match="finite"):
        index.add(one, np.full((1, 4), np.nan, np.float32))
    with pytest.raises(InputError, match="1 ids for 2"):
        index.add(one, unit_vectors(2, 4))
    with pytest.raises(InputError, match="not \\[n, 4\\]"):
        index.search(unit_vectors(1, 5), 1)
    with pytest.raises(InputError, match="negative"):
        index.search(unit_vectors(1, 4), -1)
    assert len(index) == 0


def test_the_key_that_usearch_keeps_is_refused() -> None:
    with pytest.raises(InputError, match="7046029254386353130"):
        UsearchIndex(dim=4).add(np.array([7046029254386353130], np.uint64), unit_vectors(1, 4))


@pytest.mark.parametrize("other", [{"dim": 8}, {"dtype": "f32"}])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    UsearchIndex(dim=4).save(tmp_path / "index")
    with pytest.raises(IndexFileError, match="dim 4 and dtype"):
        UsearchIndex(**{"dim": 4, **other}).load(memoryview((tmp_path / "index").read_bytes()))  # type: ignore[arg-type]


def test_bytes_that_usearch_cannot_read_change_nothing(tmp_path: Path) -> None:
    index = UsearchIndex(dim=4)
    index.add(np.array([1], np.uint64), unit_vectors(1, 4))
    with pytest.raises(IndexFileError, match="this usearch cannot read"):
        index.load(memoryview(bytes(200)))
    assert index.ids().tolist() == [1]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="nowhere"):
        UsearchIndex(dim=4).save(tmp_path / "nowhere" / "index")


@pytest.mark.parametrize("exact_below", [0, 4096])
def test_as_many_cores_as_are_given_find_the_same(exact_below: int) -> None:
    ids, vectors, queries = np.arange(2_000, dtype=np.uint64), unit_vectors(2_000, 16), unit_vectors(40, 16, seed=1)
    found = []
    for threads in (0, 1, 2):
        index = UsearchIndex(dim=16, exact_below=exact_below, threads=threads)
        for row in range(len(ids)):  # one after the other, so that there is one graph
            index.add(ids[row : row + 1], vectors[row : row + 1])
        found.append(index.search(queries, 5))
    for other_ids, other_scores in found[1:]:
        assert (found[0][0] == other_ids).all()
        assert (found[0][1] == other_scores).all()
    with pytest.raises(ConfigError, match="threads not negative"):
        UsearchIndex(dim=16, threads=-1)
