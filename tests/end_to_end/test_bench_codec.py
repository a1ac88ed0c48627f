"""``m3 bench codec`` with a tiny model: what it compares is the same, and what it says adds up."""

import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.lab.bench.codec import BenchSettings, CodecBench, bench_codec, fewer_layers, quarter, rows
from m3runtime.lab.bench.codec_error import FAISS, OURS
from m3runtime.lab.bench.codec_speed import filled, same_codes
from m3runtime.lab.bench.timing import alternate
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC, make_memories
from tests.end_to_end.commands import Place, records

WORDS = ("lamp", "oil", "ferry", "wall", "granite", "heron", "abbey", "owl", "bread", "caraway", "keeper", "dusk")


def write_texts(folder: Path, count: int) -> Path:
    """A file of so many texts, no two alike."""
    drawing = random.Random(1)
    path = folder / "texts.jsonl"
    path.write_text(records(f"Number {n}: {' '.join(drawing.choices(WORDS, k=9))}." for n in range(count)))
    return path


@pytest.fixture
def place(place: Place) -> Place:
    place.configure(memory={"reference_tokens": 96}, codec=None)
    place.configure(codec={"kind": "product"})
    write_texts(place.folder, 60)
    return place


def measured(place: Place) -> CodecBench:
    config = Config.load(place.file, {})
    texts = [document.text for document in read_documents([place.folder / "texts.jsonl"])]
    settings = BenchSettings(references=32, layers=1, rounds=5, threads=torch.get_num_threads())
    return bench_codec(config, assembly.open_adapter(config), texts, settings, lambda *_: None)


def test_the_report_has_every_contender_and_ratios_that_add_up(place: Place) -> None:
    report = measured(place)
    found = json.loads(json.dumps(report.to_json()))
    assert set(found["squared_error"]) == {"2", "4", "8"}
    for size, listed in found["squared_error"].items():
        assert len(listed) == len(FAISS) + len(OURS)
        for row in listed:
            assert row["bytes"] <= int(size)
            assert 0 <= row["both"] == pytest.approx((row["keys"] + row["values"]) / 2)
        best = min(row["both"] for row in listed if row["codec"].startswith("faiss"))
        for name, ratio in found["error_ratios"][size].items():
            (own,) = (row for row in listed if row["codec"] == name)
            assert ratio == pytest.approx(own["both"] / best)
    times = found["decoding"]["times"]
    assert all(
        spread["rounds"] == 5 and 0 < spread["low"] <= spread["median"] <= spread["high"] for spread in times.values()
    )
    for scope in ("head", "model"):
        faiss, ours = times[f"faiss sa_decode, scope {scope}"], times[f"product, scope {scope}, float32"]
        stated = found["decoding_ratios"][f"scope {scope}: faiss / ours"]
        assert stated == pytest.approx(faiss["median"] / ours["median"])
    for one in found["at_rest"]:
        assert 0 < one["zstd"] <= one["bytes"]
    assert found["settings"]["seed"] == 0
    assert {"torch", "machine"} <= set(found["environment"])
    assert not place.bank.exists()
    with (console := Console(width=120)).capture() as shown:
        console.print(report)
    for title in ("Relative squared error", "over the best of faiss", "Decoding 5 memories", "At rest", "faiss / ours"):
        assert title in shown.get()


@pytest.mark.slow
def test_the_command_finds_the_same_errors(place: Place) -> None:
    found = place.m3("bench", "codec", "--corpus", "texts.jsonl", "--references", "32", "--layers", "1", "--json").json
    assert found["squared_error"] == json.loads(json.dumps(measured(place).to_json()))["squared_error"]


def test_people_get_tables_and_no_errors_of_no_layers(place: Place) -> None:
    result = place.m3(
        "bench", "codec", "--corpus", "texts.jsonl", "--references", "40", "--layers", "0", "--rounds", "5"
    )
    assert result.code == 0, result.err
    for title in ("Decoding 5 memories", "At rest", "faiss / ours"):
        assert title in result.out
    assert "Relative squared error" not in result.out


@pytest.mark.parametrize("scope", ["head", "model"])
def test_faiss_decodes_the_very_same_codes(scope: str) -> None:
    memories = make_memories([12] * 40)
    codec = quarter(SPEC, memories, scope)
    payloads = codec.encode(memories)
    decoded = codec.decode(payloads, memories.tokens, torch.float32)
    found = [torch.from_numpy(index.sa_decode(codes)) for index, codes in same_codes(codec, payloads)]
    half = len(found) // 2
    for part, own in ((decoded.keys, found[:half]), (decoded.values, found[half:])):
        vectors = part.flatten(1, 2)  # [n, heads, tokens, dim]
        back = torch.cat(own) if scope == "model" else torch.stack(own)
        wanted = vectors.transpose(1, 2).reshape(-1, 16) if scope == "model" else vectors.transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close(back, wanted)


def test_memories_are_filled_with_their_own_tokens() -> None:
    memories = make_memories([5, 12, 1])
    full = filled(memories, 12)
    assert full.tokens.tolist() == [12, 12, 12]
    for row, own in enumerate(memories.tokens.tolist()):
        for token in range(12):
            assert torch.equal(full.keys[row, :, :, token], memories.keys[row, :, :, token % own])
    codec = quarter(SPEC, make_memories([12] * 40), "head")
    written = sum(index.sa_decode(codes).size for index, codes in same_codes(codec, codec.encode(full)))
    decoded = codec.decode(codec.encode(full), full.tokens, torch.float32)
    assert written == decoded.keys.numel() + decoded.values.numel()


def test_contenders_take_turns() -> None:
    order: list[str] = []
    found = alternate({name: lambda name=name: order.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert len(rounds) == 4
    assert all(sorted(one) == list("abc") for one in rounds)
    assert {name: spread.rounds for name, spread in found.items()} == dict.fromkeys("abc", 3)


def test_too_little_text_is_refused(place: Place) -> None:
    (place.folder / "short.txt").write_text("A single lamp burns.")
    complaint = place.m3("bench", "codec", "--corpus", "short.txt").complaint
    assert "give more texts" in complaint
    assert "no bank" in place.m3("bench", "codec").complaint


def test_the_bank_gives_the_texts_where_no_corpus_is_given(place: Place) -> None:
    place.configure(codec={"kind": "scalar"})
    assert place.m3("write", "texts.jsonl").code == 0
    found = place.m3("bench", "codec", "--references", "40", "--layers", "0", "--rounds", "5", "--json").json
    assert any(one["codec"] == "configured (scalar)" for one in found["at_rest"])


def test_memories_of_few_layers_are_those_layers() -> None:
    spec, which = fewer_layers(SPEC, 2)
    assert spec.layers == tuple(SPEC.layers[i] for i in which.tolist())
    memories = make_memories([12, 3])
    few: MemoryTensors = rows(memories, slice(1, 2), which)
    few.check(spec)
    assert torch.equal(few.keys[0, 0, :, :3], memories.keys[1, which[0], :, :3])
