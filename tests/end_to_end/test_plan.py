"""``m3 plan``: what a bank will weigh and cost, before it is written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.commands import Place, of_line

PAPER = ("plan", "--model", "memory3-2.4b", "--references", "1.12e8")
SMOLLM2 = "layers=30,hidden=576,heads=9,kv_heads=3,head_dim=64,mlp=1536,vocabulary=49152"


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    """A folder without a configuration."""
    return Place(tmp_path)


class TestThePaperSModel:
    def test_for_people(self, empty: Place) -> None:
        result = empty.m3(*PAPER, "--capacity", "2GiB", "--drive", "3GiB/s", "--iops", "5e5", "--speed", "50")
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(
            "memory3-2.4b: 44 layers of 3200 channels, 40 query heads and 8 KV heads of 80, gated MLP of 3200, "
            "vocabulary 60,299\nmemories: layers 0-21; 8 heads of 80; 8 of 128 tokens of a reference; computed in "
        )
        rows = [line.split() for line in result.out.splitlines()]
        for row in (
            ["72,089,600", "B", "1", "7.17", "PiB"],
            ["450,560", "B", "160", "45.9", "TiB"],
            ["39,424", "B", "1,830", "4.02", "TiB"],
        ):
            assert row in [found[-5:] for found in rows]
        assert "memory: 0.308 TFLOP to write, 0.000144 to read in a chunk" in result.out
        assert "text: 0.624 TFLOP to read; parameters: 2.24 to train on once" in result.out
        assert "cheaper than text from 0.494 uses on, and than parameters up to 13,400\n" in result.out
        assert "--capacity of 2 GiB: 54,383 memories, 0.0486 % of the bank" in result.out
        # 3 GiB / 40 KiB, a fifth of it, 64 tokens each, and 50 a second.
        assert of_line(result.out, r"drive, nothing cached: (.*)") == (
            "78,600 blocks of 40 KiB a second, by its bandwidth; 15,700 recalls of 5; 1,010,000 tokens a second; "
            "streams: 20,100"
        )

    def test_json(self, empty: Place) -> None:
        found = empty.m3(*PAPER, "--json").json
        assert (found["memory"]["raw"], found["memory"]["kept"], found["memory"]["payload"]) == (
            72_089_600,
            450_560,
            39_424,
        )
        assert found["spec"]["layers"] == list(range(22))
        assert found["codec"]["keys"] == "2x14+8x10"
        assert found["bank"]["embeddings"] == 112_000_000 * 4096
        assert round(found["cost"]["under_parameters"], -2) == 13_400
        assert found["reads"] is None

    def test_the_folder_s_configuration_is_not_read(self, place: Place) -> None:
        found = place.m3(*PAPER, "--json").json
        assert (found["codec"]["kind"], found["spec"]["tokens"]) == ("product", 8)
        found = place.m3(*PAPER, "--config", "m3.yaml", "--json").json
        assert (found["codec"]["kind"], found["spec"]["tokens"]) == ("scalar", 128)
        assert found["shape"]["layers"] == 44

    def test_settings_go_before_the_preset(self, empty: Place) -> None:
        found = empty.m3(*PAPER, "--set", "memory.layers=middle-half", "--set", "codec.kind=raw", "--json").json
        assert found["spec"]["layers"] == list(range(11, 33))
        assert found["memory"]["payload"] == found["memory"]["kept"] == 450_560

    def test_a_model_like_it(self, empty: Place) -> None:
        found = empty.m3(*PAPER, "--shape", "kv_heads=40", "--json").json
        assert found["memory"]["cache"] == found["memory"]["raw"]


class TestShapes:
    def test_a_shape_in_words(self, empty: Place) -> None:
        found = empty.m3("plan", "--shape", SMOLLM2, "--set", "memory.preset=null", "--json").json
        assert found["model"] == "a model of that shape"
        # README: dense memories of SmolLM2, 48 bytes for a key and a value of a head.
        assert found["memory"]["payload"] == 30 * 3 * 128 * 48
        assert found["memory"]["kept"] == 30 * 3 * 128 * 64 * 2 * 2
        # Memories of all layers cost to write what the text costs to read.
        assert found["cost"]["write"] == found["cost"]["text"]
        assert found["references"] == 1_000_000

    def test_the_preset_fits_other_heads(self, empty: Place) -> None:
        found = empty.m3("plan", "--shape", SMOLLM2, "--json").json
        assert found["memory"]["payload"] == 15 * 3 * 8 * 2 * 14


class TestConfigured:
    def test_it_is_what_a_bank_has(self, written_once: Place) -> None:
        planned = written_once.m3("plan", "--references", "6", "--json").json
        bank = written_once.m3("inspect", "--json").json
        assert planned["memory"]["block"] == bank["slot_bytes"]
        assert planned["spec"] == bank["spec"]
        assert {name: planned["codec"][name] for name in ("kind", "key_bits", "value_bits")} == {
            name: bank["codec"][name] for name in ("kind", "key_bits", "value_bits")
        }
        stored = written_once.contents()
        assert planned["bank"]["blocks"] >= sum(map(len, stored.blocks.values()))  # of references that are not full
        again = written_once.m3("plan", "--references", "6", "--json").json
        assert again["bank"]["embeddings"] == sum(map(len, stored.embeddings.values()))
        twice = written_once.m3("plan", "--references", "6", "--embedding-dim", "512", "--json").json
        assert twice["bank"]["embeddings"] == 2 * again["bank"]["embeddings"]

    def test_an_embedder_that_is_not_here_is_assumed(self, place: Place) -> None:
        place.configure(embedder={"kind": "sentence-transformers", "path": "nobody/never-was"})
        result = place.m3("plan")
        assert "(1024 dimensions each, assumed; --embedding-dim sets it)" in result.out, result.err

    def test_tiers(self, place: Place) -> None:
        found = place.m3("plan", "--json").json
        (pinned,) = found["tiers"]
        assert (pinned["tier"], pinned["capacity"]) == ("pinned", 4 * 1024**2)
        assert pinned["memories"] == 4 * 1024**2 // found["memory"]["block"]

    def test_workers_and_a_home_in_a_store(self, empty: Place) -> None:
        home = 'tiers=[{kind: pinned, capacity: 1GiB}, {kind: lance, url: "s3://bucket/bank"}]'
        arguments = ("--references", "64000", "--workers", 8, "--rate", 50, "--set", home)
        result = empty.m3("plan", "--model", "memory3-2.4b", *arguments, "--prices", "put=0.01,month=1")
        assert of_line(result.out, r"(the whole bank: .*)") == (
            "the whole bank: 19,700 TFLOP to write, 2,470 by each of 8 workers; 0.0444 hours"
        )
        # 1,000 commits: 16 requests each, and 10 for each of 156 fragments on average.
        assert of_line(result.out, r"object store, to write the bank: (.*); its room") == (
            "16,000 requests that write or list, 1,560,000 that read: 0.78 dollars"
        )
        assert "a recall, nothing cached: 10 requests; a million recalls: 4.00 dollars\n" in result.out
        found = empty.m3("plan", "--model", "memory3-2.4b", *arguments, "--json").json
        assert found["store"]["month"] == found["bank"]["total"] / 1e9 * 0.023
        assert found["work"] == {"workers": 8, "flop": 64000 * found["cost"]["write"], "seconds": 160.0} | {
            "flop_of_each": 8000 * found["cost"]["write"]
        }

    def test_without_weights(self, place: Place, model_path: Path) -> None:
        shutil.copy(model_path / "config.json", place.folder / "config.json")
        whole = place.m3("plan", "--json").json
        bare = place.m3("plan", "--set", "model.path=./", "--json").json
        assert bare.pop("model") != whole.pop("model")
        assert bare == whole
        assert not place.bank.exists()

    def test_preset_without_embedder(self, place: Place) -> None:
        place.configure(memory={"preset": "memory3"}, embedder=None, codec=None)
        found = place.m3("plan", "--json").json
        assert (found["spec"]["layers"], found["spec"]["tokens"]) == ([0, 1], 8)
        shown = place.m3("config", "--json").json["origins"]
        assert shown["embedder.path"] == shown["codec.preset"] == shown["memory.layers"] == "memory.preset"
        assert "embedder.path: BAAI/bge-m3" in place.m3("config").out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model", "memory4"],
            "m3: --model memory4 is not known; known are memory3-2.4b. Describe a shape with --shape",
        ),
        (["--shape", "layer=3"], "m3: --shape: layer is not known; did you mean layers?"),
        (["--shape", "layers=3"], "m3: --shape: hidden, heads, mlp, vocabulary are missing"),
        (["--references", "1.5"], "m3: --references must be a whole number such as 1000 or 1e8"),
        (["--references", "0"], "m3: --references must be a whole number"),
        (["--drive", "fast"], "m3: --drive must be a size such as"),
        (["--drive", "0"], "m3: --drive must be above 0"),
        (["--iops", "-3"], "m3: --iops must be a whole number"),
        (["--capacity", "much"], "m3: --capacity must be a size such as"),
        (["--speed", "3"], "m3: --speed tells how many streams a drive serves"),
        (["--speed", "0", "--iops", "9"], "m3: --speed must be above 0, not 0.0"),
        (["--rate", "0"], "m3: --rate must be above 0, not 0.0"),
        (["--prices", "put=0.1,gets=1"], "m3: --prices gets=1: must be put=, get= or month= and dollars"),
        (["--set", "memory.layers=0-4"], "m3: memory.layers: the model has layers 0 to 3, not [0, 1, 2, 3, 4]"),
        (["--set", "codec.bits=5"], "m3: codec.bits of the scalar codec must be 4 or 8, not 5"),
        (["--set", "model.path=./none"], "m3: model.path: no such folder: "),
        (["--config", "m4.yaml"], "m3: no such configuration file: m4.yaml"),
        (["--model", "memory3-2.4b", "--config", "m4.yaml"], "m3: no such configuration file: m4.yaml"),
    ],
)
def test_mistakes(place: Place, arguments: list[str], expected: str) -> None:
    before: Any = sorted(place.folder.iterdir())
    assert place.m3("plan", *arguments).complaint.startswith(expected)
    assert sorted(place.folder.iterdir()) == before
