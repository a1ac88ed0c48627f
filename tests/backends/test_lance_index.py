"""The index of a Lance home: the laws of searching, and what is its own."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lance")

from m3backends.lance import building
from m3backends.lance.coverage import index_of
from m3backends.lance.home import LanceHome
from m3backends.lance.index import LanceIndex
from m3backends.lance.schema import reference_row, seal_embedding
from m3backends.lance.snapshot import Change
from m3runtime.errors import ConfigError, IndexFileError
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.testing.blocks import SLOT_BYTES, make_batch, make_ids, make_reference
from m3runtime.testing.index import SearchLaws, brute_force, unit_vectors


class OfItsOwnHome(LanceIndex):
    """Puts what is added into a home, whatever its ids, and takes it out again."""

    def __init__(self, *, dim: int, home: LanceHome) -> None:
        super().__init__(dim=dim)
        self.home = home
        self.attach(home)
        home._table.widen_columns(dim)

    def add(self, ids: Ids, vectors: Embeddings) -> None:
        new, first = np.unique(ids, return_index=True)
        known = set(self.ids().tolist())
        rows = [
            reference_row(int(id), make_reference(int(id)), vectors[row], seal_embedding(int(id), vectors[row]))
            for id, row in zip(new.tolist(), first.tolist(), strict=True)
            if id not in known
        ]
        if rows:
            self.home._table.write(lambda _: (Change(rows), None))
        self.hold(ids)

    def remove(self, ids: Ids) -> None:
        super().remove(ids)
        if len(ids):
            self.home._table.write(lambda _: (Change(gone={"id": ids.tolist()}), None))


class TestLanceIndex(SearchLaws):
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.made = 0

    @pytest.mark.slow
    def test_thousands_at_once(self) -> None:
        super().test_thousands_at_once()

    def make_index(self) -> OfItsOwnHome:
        self.made += 1
        place = self.folder / f"home {self.made}"
        return OfItsOwnHome(dim=self.dim, home=LanceHome(path=place, slot_bytes=SLOT_BYTES, durability="commit"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[LanceHome]:
    with LanceHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES, durability="commit") as home:
        yield home


def filled(home: LanceHome, count: int, dim: int = 64, batches: int = 1) -> tuple[LanceIndex, Ids, Embeddings]:
    """A home with vectors in groups, as texts have them, and its index, which is built from 1,000 on."""
    random = np.random.default_rng(0)
    vectors = unit_vectors(count // 50, dim)[random.integers(0, count // 50, count)] + 0.5 * unit_vectors(count, dim, 1)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = np.arange(count, dtype=np.uint64)
    for some in np.array_split(ids, batches):
        home.catalogue(some, [replace(make_reference(id)) for id in some.tolist()], vectors[some])
    index = LanceIndex(dim=dim, exact_below=1000, probes=30)
    index.attach(home)
    index.hold(ids)
    return index, ids, vectors


def recall(index: LanceIndex, ids: Ids, vectors: Embeddings, queries: Embeddings) -> float:
    """The share of the five nearest that a search finds."""
    found, _ = index.search(queries, 5)
    best = [set(brute_force(ids, vectors, query)[0][:5].tolist()) for query in queries]
    return sum(len(set(row) & own) for row, own in zip(found.tolist(), best, strict=True)) / (5 * len(queries))


def is_indexed(home: LanceHome) -> bool:
    return home._table.newest().dataset.has_index


def test_what_is_added_is_found_before_and_after_it_is_indexed(home: LanceHome) -> None:
    index, ids, vectors = filled(home, 2000)
    queries = vectors[::40] + 0.3 * unit_vectors(50, 64, 3)
    assert recall(index, ids, vectors, queries) == 1
    index.update()
    assert is_indexed(home)
    assert recall(index, ids, vectors, queries) >= 0.98
    more, later = unit_vectors(600, 64, 7), np.arange(5000, 5600, dtype=np.uint64)
    home.catalogue(later, [make_reference(id) for id in later.tolist()], more)
    assert not np.isin(index.search(more[:20], 1)[0], later).any()  # not told of yet
    index.hold(later)
    assert index.search(more[:20], 1)[0][:, 0].tolist() == later[:20].tolist()
    index.update()
    assert index.search(more[:20], 1)[0][:, 0].tolist() == later[:20].tolist()
    joined = np.concatenate([ids, later]), np.concatenate([vectors, more])
    assert recall(index, *joined, queries) >= 0.98


@pytest.mark.parametrize("refine", [0, 4])
@pytest.mark.parametrize("exact_below", [500, 100])  # 200 rows are held in memory at most, or compared by the library
def test_rows_that_the_index_does_not_cover_come_in_order_with_its_own(
    home: LanceHome, refine: int, exact_below: int
) -> None:
    built, ids, vectors = filled(home, 1000)
    built.update()
    later = np.arange(1000, 1400, dtype=np.uint64)
    near = vectors[:400] + 0.05 * unit_vectors(400, 64, 5)
    home.catalogue(later, [make_reference(id) for id in later.tolist()], near)
    index = LanceIndex(dim=64, exact_below=exact_below, refine=refine)
    index.attach(home)
    index.hold(np.append(ids, later))
    found, scores = index.search(vectors[:400:10], 2)
    assert found.tolist() == [[id, 1000 + id] for id in range(0, 400, 10)]
    assert scores[:, 0] == pytest.approx(1, abs=0.05)
    assert scores[:, 1] == pytest.approx((vectors[:400:10] * near[::10]).sum(1), abs=0.05)
    home.discard(later[:10])
    index.remove(later[:10])
    assert index.search(vectors[:1], 1)[0].tolist() == [[0]]
    assert not np.isin(index.search(vectors[:10], 5)[0], later[:10]).any()


def test_what_is_forgotten_is_not_found_and_leaves_the_index(home: LanceHome) -> None:
    index, ids, vectors = filled(home, 2000)
    index.update()
    gone = ids[::2]
    home.discard(gone)
    found, scores = index.search(vectors[:40], 5)
    assert not np.isin(found, gone).any()
    assert (np.diff(scores, axis=1) <= 0).all()
    index.remove(gone)
    index.rebuild()
    home.compact()
    assert recall(index, ids[1::2], vectors[1::2], vectors[:40]) >= 0.98


def dies(*_: object) -> None:
    """The death of a process that should make a part."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("fate", [None, dies])
def test_many_build_the_index_that_one_builds(
    home: LanceHome, fate: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, ids, vectors = filled(home, 1500, batches=5)
    dataset = home._table.newest().dataset
    chosen = building.plan(dataset, len(ids), 1)
    building.build(dataset, chosen)
    found, scores = index.search(vectors[::30], 5)
    if fate:
        monkeypatch.setattr(building, "make_part", fate)  # the others die
    building.build(home._table.newest().dataset, chosen, workers=3)
    again, scores_again = index.search(vectors[::30], 5)
    assert again.tolist() == found.tolist()
    assert scores_again.tolist() == scores.tolist()
    assert index_of(home._table.newest().dataset).num_rows_indexed >= len(ids)
    home.compact()
    assert len(list((home.path / "_indices").iterdir())) == 1  # the last, without parts


def test_another_home_is_refused() -> None:
    with pytest.raises(ConfigError, match="index of a home of kind lance"):
        LanceIndex(dim=4).attach(None)  # type: ignore[arg-type]


def test_it_has_no_file(home: LanceHome, tmp_path: Path) -> None:
    home.commit(make_batch([1]))
    index = LanceIndex(dim=8)
    index.attach(home)
    index.hold(make_ids(1))
    with pytest.raises(IndexFileError, match="lies in the home"):
        index.save(tmp_path / "index")
    with pytest.raises(IndexFileError, match="lies in the home"):
        index.load(memoryview(b""))
