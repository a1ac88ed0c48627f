"""``m3 bench index``: both banks are whole, are used again, and the report adds up."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.bench.bank_server import MadeEmbedder
from m3runtime.lab.bench.index import BASELINE, CONFIGURED
from tests.end_to_end.commands import Place


def test_a_query_is_near_a_reference_and_the_same_again() -> None:
    first, second = MadeEmbedder("", dim=64), MadeEmbedder("made", dim=64)
    vectors = first.embed_queries([f"query {number}" for number in range(50)])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert (vectors[7] == second.embed_references(["another query 7"])[0]).all()
    assert len(np.unique(vectors, axis=0)) == 50


@pytest.mark.long
def test_the_report_adds_up(place: Place, tmp_path: Path) -> None:
    command = ("bench", "index", "--references", "130", "--baseline", "40", "--queries", "6", "--dim", "16")
    command = (*command, "--folder", str(tmp_path / "banks"), "--json")
    first, second = place.m3(*command).json, place.m3(*command).json
    assert [row["built"] is None for found in (first, second) for row in found["rows"]] == [False, False, True, True]
    for found in (first, second):
        assert [(row["name"], row["memories"]) for row in found["rows"]] == [(CONFIGURED, 130), (BASELINE, 40)]
        for row in found["rows"]:
            assert row["found"] == 1  # usearch compares all of so few
            assert row["opened"]["before_bytes"] <= row["peak_bytes"]
            for times in (row["search_s"], row["recall_s"]):
                assert 0 < times["p50"] <= times["p90"] <= times["p99"]
            assert row["search_s"]["p50"] < row["recall_s"]["p50"]
        ours, theirs = (row["recall_s"]["p50"] for row in found["rows"])
        ratio, low, high = found["ratios"]["recall, p50"]
        assert ratio == pytest.approx(ours / theirs)
        assert low <= ratio <= high
    other = place.m3(*("50" if word == "130" else word for word in command))
    assert other.code != 0
    assert "it has 130 memories, not 50; remove it, or name another folder" in other.err
    config = Config.load(place.file, {}, {"bank": str(tmp_path / "banks" / CONFIGURED)})
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        assert len(bank.home) == 130
