"""A write that trained the codec leaves no block in int8, but those that the codec would spoil.

`test_kill` kills such a write at any moment.
"""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.codecs import limit
from m3runtime.codecs.limit import ErrorLimit
from m3runtime.config.schema import Config
from m3runtime.documents.survey import Reading
from m3runtime.memory import block
from m3runtime.runtime import Runtime
from m3runtime.writing.mirror import Mirror
from m3runtime.writing.writer import Writer
from tests.end_to_end.commands import records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.nursery import Nursery
from tests.end_to_end.test_codec_life import TEXTS, TOKENS, Life, life, opened

__all__ = ["life", "opened"]

pytest.importorskip("faiss")


def held(life: Life) -> dict[str, tuple[bytes, object]]:
    """The embedding and the places of each text."""

    def work(bank: Bank) -> dict[str, tuple[bytes, object]]:
        ids, vectors = next(iter(bank.home.embeddings()))
        references = bank.home.references(ids)
        return {one.text: (row.tobytes(), one.places) for one, row in zip(references, vectors, strict=True) if one}

    return life.look(work)  # type: ignore[no-any-return]


def spoilt(life: Life) -> list[bool]:
    """For each block in int8: would the codec lose too much of it?"""

    def work(bank: Bank) -> list[bool]:
        found = []
        for id in bank.home.ids():
            slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
            assert bank.home.read(np.array([id]), slot)[0]
            if bank.codecs.of(block.headers(slot.numpy())[0]).kind == "scalar":
                memory = bank.decode(slot, torch.float32)
                decoded = bank.codec.decode(bank.codec.encode(memory), memory.tokens, torch.float32)
                found.append(bool(ErrorLimit(bank.manifest.typical_errors).exceeded(memory, decoded)))
        return found

    return life.look(work)  # type: ignore[no-any-return]


def test_only_what_the_codec_would_spoil_stays_in_int8(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "MOST", 1.1)
    life.write(TEXTS[:10])
    before = held(life)
    report = life.write(TEXTS)
    assert report.codec == "product"
    assert report.reencoded > 5
    assert report.left > 0
    assert all(spoilt(life))
    assert life.kinds()["scalar"] == len(spoilt(life)) >= report.left
    assert held(life).keys() == set(TEXTS)
    assert held(life).items() >= before.items()
    assert not (life.config.bank / "training").exists()
    again = life.write(TEXTS)
    assert (again.known, again.reencoded, again.forgotten) == (len(TEXTS), 0, 0)


def test_the_room_of_old_blocks_is_given_back(life: Life) -> None:
    life.write(TEXTS, sample_tokens=10**6)
    in_int8 = life.look(lambda bank: bank.home.stored_bytes())
    assert life.write(TEXTS, sample_tokens=1800).left < 10
    assert life.look(lambda bank: bank.home.stored_bytes()) < in_int8


def test_sources_stay_in_step(opened: tuple[Config, Adapter], tmp_path: Path) -> None:
    config, adapter = opened
    config = config.model_copy(update={"bank": tmp_path / "bank"})
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("\n\n".join(TEXTS[:9]))
    second.write_text("\n\n".join(TEXTS[5:]))
    writer = Writer(config, adapter, assembly.open_embedder(config))
    with closing(Mirror(config, Reading(), writer=writer)) as mirror:
        mirror.write([first])
        report = mirror.write([first, second])
        assert report.written is not None
        assert report.written.reencoded > 0
        assert len(mirror.survey([first, second]).unchanged) == 2
        with closing(assembly.open_bank(config, read_only=True)) as bank:
            references = bank.home.references(bank.home.ids_of(mirror.names.name(first)))
    texts = " ".join(one.text for one in references if one)
    assert all(text in texts for text in TEXTS[:9])


def test_a_process_that_was_open_recalls_the_same_texts(new_place: NewPlace, nursery: Nursery, tmp_path: Path) -> None:
    place = new_place(tmp_path)
    place.configure(memory={"reference_tokens": 96}, recall={"refresh": 0, "memories": 3})
    place.configure(codec={"kind": "product", "bytes": 6, "sample_tokens": TOKENS})
    place.text("corpus.jsonl", records(TEXTS[:30]))
    place.m3("write", "corpus.jsonl")
    with Runtime.open(Config.load(place.file, environ={}), read_only=True) as runtime:
        stream = runtime.stream(torch.float32)
        before = {text: stream.recall(text) for text in TEXTS[:30:7]}
        place.text("corpus.jsonl", records(TEXTS))
        report = nursery.m3(place, "write", "corpus.jsonl", "--json").json
        assert report["codec"] == "product"
        assert report["reencoded"] > 30
        codecs = set()
        for text, old in before.items():
            new = stream.recall(text)
            assert new.references[0].text == old.references[0].text == text
            assert len(new.ids) == len(old.ids) == 3
            assert not set(new.ids) & set(old.ids)
            slot = torch.zeros(1, runtime.bank.home.slot_bytes, dtype=torch.uint8)
            assert runtime.hierarchy.read(np.array(new.ids[:1], np.uint64), slot)[0]
            codecs.add(runtime.bank.codecs.of(block.headers(slot.numpy())[0]).kind)
        assert codecs == {"product"}
