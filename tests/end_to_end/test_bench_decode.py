"""``m3 bench decode`` with a tiny model: contenders write the same, and what is said of them adds up."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.lab.bench.banks import full_pieces
from m3runtime.lab.bench.comparison import Comparable
from m3runtime.lab.bench.decode import boundaries, contender, draw_prompts, measured
from m3runtime.lab.bench.decode_runs import (
    BARE,
    KINDS,
    MEMORIES,
    NOTHING,
    PLAIN,
    TEXT,
    WITHOUT_LOOKAHEAD,
    Contenders,
    Run,
)
from tests.end_to_end.commands import Place

SHORT = ("--set", "recall.chunk_tokens=4", "--set", "recall.lookahead_tokens=2", "--threads", "1")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("picture") / "run.png"


@pytest.fixture(scope="module")
def found(written_once: Place, picture: Path) -> Any:
    asked = ("--new-tokens", "10", "--batch", "1", "--batch", "2", "--rounds", "1", "--memories", "2")
    return written_once.m3("bench", "decode", *asked, *SHORT, "--plot", picture, "--json").json


def test_the_report_has_every_contender_at_every_batch(found: Any) -> None:
    assert [batch["batch"] for batch in found["batches"]] == [1, 2]
    for batch in found["batches"]:
        assert set(batch["contenders"]) == set(KINDS)
        for kind in (PLAIN, TEXT):
            assert batch["chosen"][kind] in batch["variants"][kind]
    assert found["settings"]["threads"] == 1
    assert found["prompt_tokens"] == 20
    assert {"torch", "transformers", "machine"} <= set(found["environment"])
    assert found["config"]["recall"]["min_score"] == -1


def test_ratios_of_one_round_are_quotients(found: Any) -> None:
    for batch in found["batches"]:
        plainly, text = batch["contenders"][PLAIN], batch["contenders"][TEXT]
        for one in batch["contenders"].values():
            for figure, ratio in (("tokens_per_s", "kept"), ("call_tokens_per_s", "call_kept")):
                assert one[ratio]["median"] == pytest.approx(one[figure]["median"] / plainly[figure]["median"])
            quotient = one["first_token_s"]["median"] / text["first_token_s"]["median"]
            assert one["first_token_of_text"]["median"] == pytest.approx(quotient)


def test_the_bound_is_that_of_the_models_bytes(found: Any, written_once: Place) -> None:
    adapter = assembly.open_adapter(Config.load(written_once.file, {}))
    assert isinstance(adapter, Comparable)
    for batch in found["batches"]:
        bound = batch["bound"]
        assert bound["weight_bytes"] == adapter.baseline().weight_bytes
        # Keys and values of 4 layers, 2 KV heads, 16 channels in float32.
        assert bound["memory_bytes"] == pytest.approx(2 * 4 * 2 * 16 * 4 * bound["memory_tokens"])
        read = bound["weight_bytes"] + batch["batch"] * bound["memory_bytes"]
        assert bound["kept"] == pytest.approx(bound["weight_bytes"] / read)
        assert bound["memory_tokens"] > 0


def test_every_chunk_is_accounted_for(found: Any) -> None:
    for batch in found["batches"]:
        for name, ends in batch["boundaries"].items():
            assert ends["chunks"] == 3 * batch["batch"]
            assert ends["late"] == 0  # the configuration waits
            assert 0 <= ends["waited"] <= ends["recalling"] < 1
            assert name == MEMORIES or ends["guesses"] == 0
            assert 0 <= ends["hit_rate"] <= 1
        assert batch["same_tokens"] == {"without lookahead": True, "without caching tiers": True}


def test_a_quick_run_times_the_baseline_and_memories_alone(written_once: Place) -> None:
    asked = ("--new-tokens", "6", "--batch", "2", "--rounds", "1", "--memories", "2", "--quick")
    (batch,) = written_once.m3("bench", "decode", *asked, *SHORT, "--json").json["batches"]
    assert set(batch["contenders"]) == {PLAIN, MEMORIES}
    assert set(batch["variants"]) == {PLAIN}
    assert batch["contenders"][MEMORIES]["first_token_of_text"] is None
    assert set(batch["boundaries"]) == {MEMORIES}
    assert batch["same_tokens"] == {}
    shown = written_once.m3("bench", "decode", *asked, *SHORT)
    assert MEMORIES in shown.out
    assert TEXT not in shown.out


def test_a_run_is_drawn(found: Any, picture: Path) -> None:
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert image.format == "PNG"
    assert colours is not None
    assert {(31, 119, 180), (44, 160, 44)} <= {colour for _, colour in colours}


def run(seconds: float, first: float = 1.0, tokens: int = 11, **rest: Any) -> Run:
    return Run((tuple(range(tokens)),), first, seconds, **rest)


def test_ratios_are_of_the_same_round() -> None:
    runs = {PLAIN: [run(2.0), run(3.0), run(11.0)], TEXT: [run(9.0, 4.0)] * 3, BARE: [run(3.0), run(3.0), run(6.0)]}
    one = contender(runs, BARE)
    assert one.tokens_per_s.median == pytest.approx(5.0)
    assert one.kept.median == pytest.approx(1.0)  # of 0.5, 1 and 2
    assert one.call_kept.median == pytest.approx(1.0)
    assert one.first_token_of_text is not None
    assert one.first_token_of_text.median == pytest.approx(0.25)
    assert contender({PLAIN: runs[PLAIN], BARE: runs[BARE]}, BARE).first_token_of_text is None


def test_what_happens_between_chunks_is_summed_up() -> None:
    phases = ({"recall": 0.2, "wait": 0.1}, {"recall": 0.3})
    ids = (((1, 2), (2, 3), (4,)),)
    ends = boundaries([run(11.0, recalls=phases, ids=ids, late=1, guesses=4, hits=2), run(11.0)])
    assert ends.chunks == 3
    assert ends.recalling == pytest.approx(0.5 / 20)
    assert ends.waited == pytest.approx(0.1 / 20)
    assert ends.kept == pytest.approx(1 / 3)
    assert ends.foreseen == pytest.approx(2 / 2)
    assert ends.hit_rate == 0.5
    assert ends.late == 1


def test_contenders_recall_what_they_are_meant_to(written_once: Place) -> None:
    config = Config.load(written_once.file, {}, {"recall.chunk_tokens": "4", "recall.lookahead_tokens": "2"})
    adapter = assembly.open_adapter(config)
    with Contenders(measured(config, 3), adapter, timeline=1000) as contenders:
        prompts = draw_prompts(adapter, contenders.texts(), 20, seed=0)[:2]
        asked = contenders.with_text(prompts)
        assert all(asked[i].text.endswith(prompts[i].text) for i in range(2))
        assert all(asked[i].text.count("Reference:") == 3 for i in range(2))
        contenders.choose(PLAIN, "sdpa, dynamic", 40)
        contenders.choose(TEXT, "eager, static", 400)
        runs = {kind: contenders.run(kind, asked if kind == TEXT else prompts, 10) for kind in KINDS}
        assert all(len(row) == 10 for one in runs.values() for row in one.tokens)
        assert runs[PLAIN].tokens == runs[BARE].tokens
        assert [[len(ids) for ids in row] for row in runs[NOTHING].ids] == [[0] * 3] * 2
        assert runs[NOTHING].memory_tokens == 0
        for kind in (MEMORIES, WITHOUT_LOOKAHEAD):
            assert [[len(ids) for ids in row] for row in runs[kind].ids] == [[3] * 3] * 2
        assert runs[MEMORIES].tokens == runs[WITHOUT_LOOKAHEAD].tokens
        assert runs[WITHOUT_LOOKAHEAD].guesses == 0
        contenders.cool()
        drawn, events = contenders.timeline(prompts, 10)
        assert drawn.tokens == runs[MEMORIES].tokens
        chunks = [(event.start, event.end) for event in events if event.name == "chunk"]
        assert len(chunks) == 5 + 2  # of the prompt, and of what is written after its last chunk
        assert all(before[1] <= after[0] for before, after in pairwise(chunks))
        assert min(event.start for event in events) >= 0


def test_a_corpus_makes_a_bank_of_full_references_for_the_while(place: Place) -> None:
    place.configure(memory={"reference_tokens": 24})
    words = "the harbour lamp of the old town burns walnut oil and turns once an hour number"
    place.text("texts.txt", "\n\n".join(f"{words} {n}. {words} {n * n}." for n in range(20)))
    adapter = assembly.open_adapter(Config.load(place.file, {}))
    pieces = full_pieces(adapter, list(read_documents([place.folder / "texts.txt"])), 9)
    assert len(pieces) == 9
    assert all(22 <= adapter.count_tokens(piece.text) <= 24 for piece in pieces)
    asked = ("--new-tokens", "6", "--batch", "1", "--rounds", "1", "--memories", "2", "--references", "9")
    result = place.m3("bench", "decode", "--corpus", "texts.txt", *asked, *SHORT)
    assert result.code == 0, result.err
    for told in ("Batch 1", "bytes allow", "temporary, 9 memories", "1 threads", "the same tokens"):
        assert told in " ".join(result.out.split())
    assert not place.bank.exists()


def test_without_bank_and_corpus_it_says_what_to_do(place: Place, tmp_path: Path) -> None:
    for command in ("decode", "tiers"):
        assert "--corpus" in place.m3("bench", command).complaint
    place.text("short.txt", "Too short a text.")
    assert "128 tokens" in place.m3("bench", "decode", "--corpus", "short.txt").complaint
