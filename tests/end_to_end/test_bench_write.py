"""``m3 bench write`` with a tiny model: the same references are read and written, and what is said adds up."""

import pytest

from m3runtime.lab.bench.write import ENCODE, PLAIN, WRITE
from m3runtime.writing.pipeline import PHASES
from tests.end_to_end.commands import Place
from tests.end_to_end.test_bench_codec import write_texts


@pytest.fixture
def place(place: Place) -> Place:
    place.configure(memory={"reference_tokens": 24, "batch_size": 4}, codec=None)
    place.configure(codec={"kind": "product", "bytes": 2})
    write_texts(place.folder, 40)
    return place


def test_a_corpus_is_read_and_written_and_ratios_add_up(place: Place) -> None:
    before = sorted(place.folder.iterdir())
    found = place.m3(
        "bench", "write", "--corpus", "texts.jsonl", "--references", 9, "--rounds", 2, "--threads", 1, "--json"
    ).json
    assert set(found["seconds"]) == {PLAIN, ENCODE, WRITE}
    assert all(spread["rounds"] == 2 and spread["median"] > 0 for spread in found["seconds"].values())
    assert set(found["kept"]) == {PLAIN, ENCODE}
    for name, kept in found["kept"].items():
        theirs, ours = found["seconds"][name], found["seconds"][WRITE]
        # Medians of two rounds are means: a ratio of means lies between the ratios.
        assert kept["low"] * 0.5 <= theirs["median"] / ours["median"] <= kept["high"] * 2
    assert set(found["shares"]) == set(PHASES)
    assert 0 < sum(share["median"] for share in found["shares"].values()) < 1.5
    assert found["shares"]["model"]["median"] > 0
    assert (found["settings"]["references"], found["settings"]["rounds"], found["batch"]) == (9, 2, 4)
    assert 9 * 21 <= found["tokens"] <= 9 * 24
    assert found["overlapping"] is False
    assert {"torch", "machine"} <= set(found["environment"])
    assert sorted(place.folder.iterdir()) == before


def test_the_references_and_the_codec_of_the_bank(place: Place) -> None:
    place.configure(memory={"reference_tokens": 96}, codec={"kind": "product", "bytes": 2, "sample_tokens": 200})
    assert place.m3("write", "texts.jsonl", "--json").json["codec"] is not None
    before = place.contents()
    found = place.m3("bench", "write", "--references", 5, "--rounds", 1, "--json").json
    assert found["settings"]["references"] == 5
    (trained,) = place.bank.glob("codec-*.safetensors")
    assert found["config"]["codec"]["file"] == str(trained)
    assert place.contents() == before


def test_people_get_tables(place: Place) -> None:
    place.configure(codec=None)
    place.configure(codec={"kind": "scalar"})
    result = place.m3("bench", "write", "--corpus", "texts.jsonl", "--references", 4, "--rounds", 1)
    assert result.code == 0, result.err
    for text in (PLAIN, WRITE, "Where the time goes", "in turn with the model"):
        assert text in result.out


def test_without_a_bank_and_a_corpus_it_says_so(place: Place) -> None:
    assert "no bank" in place.m3("bench", "write").complaint
