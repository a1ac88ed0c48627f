"""``m3 bench recall``: the banks that it makes up are sound, and what is said of recalls adds up."""

from pathlib import Path

import numpy as np
import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.bench.recall import OURS, PARTS, WHOLE
from m3runtime.lab.bench.synthetic import around, build, centres, queries
from tests.end_to_end.commands import Place


def test_memories_lie_around_real_texts() -> None:
    about = np.eye(3, 300, dtype=np.float32)
    vectors = around(about, 200, seed=4)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    cosines = np.sort(vectors @ about.T, axis=1)
    assert cosines[:, -1].mean() == pytest.approx(0.82, abs=0.02)
    assert (cosines[:, -1] - cosines[:, -2] > 0.3).all()
    assert (vectors == around(about, 200, seed=4)).all()


def test_no_text_is_asked_twice() -> None:
    texts = queries(100)
    assert len(set(texts)) == 100
    assert all(len(text.split()) == 48 for text in texts)
    assert queries(3) == queries(3)


def test_a_made_up_bank_is_whole(place: Place, tmp_path: Path) -> None:
    config = Config.load(place.file, {})
    embedder = assembly.open_embedder(config)
    bank, built = build(config, embedder, centres(embedder), tmp_path / "made", 130, lambda *_: None)
    try:
        assert built.memories == len(bank.home) == 130
        index = assembly.bank_index(config, bank).load()
        for ids, vectors in bank.home.embeddings():
            found, scores = index.search(vectors, 1)
            assert (found[:, 0] == ids).all()
            assert scores == pytest.approx(1, abs=2e-3)
    finally:
        bank.close()


def test_the_report_adds_up(written_once: Place) -> None:
    found = written_once.m3("bench", "recall", "--size", "20", "--size", "60", "--rounds", "1", "--json").json
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["20", "60"]
    assert [rows[name]["memories"] for name in ("20", "60")] == [20, 60]
    for row in rows.values():
        phases = {name: spread["median"] for name, spread in row["phases"].items()}
        assert all(seconds > 0 for seconds in phases.values())
        assert sum(phases[name] for name in PARTS) <= phases[WHOLE]
        assert phases[OURS] == pytest.approx(phases[WHOLE] - phases["embed"])
        for name, share in row["of_embedding"].items():
            assert share["median"] == pytest.approx(phases[name] / phases["embed"])
    for phase in (WHOLE, OURS):
        quotient = rows["60"]["phases"][phase]["median"] / rows["20"]["phases"][phase]["median"]
        assert found["growth"][phase]["median"] == pytest.approx(quotient)
    assert [built["memories"] for built in found["built"]] == [20, 60]


def test_people_get_a_table_without_a_bank_too(place: Place) -> None:
    result = place.m3("bench", "recall", "--size", "20", "--rounds", "1", "--threads", "1")
    assert result.code == 0, result.err
    for told in ("embed", "deliver", "times as long at 20 as at 20", "1 threads"):
        assert told in " ".join(result.out.split())
    assert not place.bank.exists()


def test_the_configured_bank_cold_and_warm(written_once: Place) -> None:
    before = written_once.contents()
    found = written_once.m3("bench", "recall", "--bank", "--memories", "1", "--json").json
    cold, warm = found["rows"]
    assert (cold["name"], warm["name"]) == ("cold", "warm")
    # Six references recall each another one: the first is for warming up, and one more is cold in each round.
    assert found["settings"]["rounds"] == cold["phases"]["recall"]["rounds"] == warm["phases"]["recall"]["rounds"] == 4
    assert cold["memories"] == warm["memories"] == 6
    assert found["warm_other"] == 0
    assert found["memory_tokens"]["median"] > 0
    for row in (cold, warm):
        assert row["of_embedding"]["recall"]["low"] > 1
        assert row["phases"]["embed"]["low"] > 0
    assert cold["phases"]["decode"]["low"] > 0
    assert written_once.contents() == before


def test_the_configured_bank_for_people(written_once: Place) -> None:
    result = written_once.m3("bench", "recall", "--bank", "--memories", "1", "--rounds", "3", "--threads", "1")
    assert result.code == 0, result.err
    for told in ("cold, 6", "warm, 6", "times the embedding of the query", "cold over warm", "chose other memories: 0"):
        assert told in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--bank", "--size", "20"), "leave them out with --bank"),
        (("--bank", "--huge"), "leave them out with --bank"),
        (("--bank", "--memories", "5", "--json"), "recall fewer memories with --memories"),
    ],
)
def test_it_says_why_a_bank_cannot_be_measured(written_once: Place, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in written_once.m3("bench", "recall", *arguments).complaint


def test_without_a_bank_it_says_so(place: Place) -> None:
    assert str(place.bank) in place.m3("bench", "recall", "--bank").complaint
