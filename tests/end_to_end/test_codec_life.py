"""A bank's codec from its first reference on: int8, then trained once, and anew by ``m3 codec refit``.

The reference is the model itself: what a bank's memories decode to is compared with what the model computes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import BankCodecs
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.limit import relative_errors
from m3runtime.codecs.steps import Steps
from m3runtime.config.schema import CodecConfig, Config
from m3runtime.documents.document import Document
from m3runtime.errors import BankMismatchError, BlockError
from m3runtime.memory import block
from m3runtime.runtime import Runtime
from m3runtime.writing import reencoding
from m3runtime.writing.fitting import TRAINING
from m3runtime.writing.refitting import refit
from m3runtime.writing.verification import verify
from m3runtime.writing.writer import Writer, WriteReport
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace

pytest.importorskip("faiss")

WORDS = [
    *("lamp", "heron", "ferry", "abbey", "wall", "owl", "bread", "harbour"),
    *("walnut", "dusk", "tide", "bell", "stone", "granite", "keeper", "oil"),
]
TEXTS = [
    f"The {WORDS[n % 16]} of {WORDS[n * 7 % 16]} {n} was seen by {WORDS[n * 5 % 16]} {n * 31 % 97} in {1400 + n}."
    for n in range(90)
]
ALIKE = [f"Box {n} of 90 is empty." for n in range(90)]
TOKENS = 1800
"""Enough to train a codec of this model on: about half of these texts."""


@pytest.fixture(scope="module")
def opened(new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, Adapter]]:
    place = new_place(tmp_path_factory.mktemp("life"))
    place.configure(
        memory={"reference_tokens": 96},
        codec={"kind": "product", "bytes": 6, "sample_tokens": TOKENS},
        embedder={"dim": 16},
    )
    config = Config.load(place.file, environ={})
    adapter = assembly.open_adapter(config)
    yield config, adapter
    adapter.close()


class Life:
    """A bank, what is written into it, and what it became."""

    def __init__(self, config: Config, adapter: Adapter, folder: Path) -> None:
        self.adapter = adapter
        self.config = config.model_copy(update={"bank": folder / "bank"})

    def write(self, texts: list[str], **codec: Any) -> WriteReport:
        self.configure(**codec)
        documents = [Document(f"text {text}", text) for text in texts]
        return Writer(self.config, self.adapter, assembly.open_embedder(self.config)).write(documents, whole=True)

    def configure(self, **codec: Any) -> None:
        if codec:
            of_codec = type(self.config.codec).model_validate({**self.config.codec.model_dump(), **codec})
            self.config = self.config.model_copy(update={"codec": of_codec})

    def look(self, work: Callable[[Bank], Any]) -> Any:
        with closing(assembly.open_bank(self.config, read_only=True)) as bank:
            return work(bank)

    def errors(self) -> dict[str, float]:
        """The mean relative error of the memory of each text, decoded by the codec of its block."""

        def work(bank: Bank) -> dict[str, float]:
            found = {}
            for id, one in zip(bank.home.ids(), bank.home.references(bank.home.ids()), strict=True):
                slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
                assert one is not None
                assert bank.home.read(np.array([id]), slot)[0]
                true = self.adapter.encode([one.text])
                found[one.text] = float(relative_errors(true, bank.decode(slot, torch.float32)).mean())
            return found

        return self.look(work)  # type: ignore[no-any-return]

    def kinds(self) -> Mapping[str, int]:
        """Blocks by the kind of their codec."""
        report = verify(self.config)
        assert report.clean
        kinds = Counter[str]()
        for name, count in report.codecs.items():
            kinds[name.split()[0]] += count
        return kinds


@pytest.fixture
def life(opened: tuple[Config, Adapter], tmp_path: Path) -> Life:
    return Life(*opened, tmp_path)


@pytest.fixture(scope="module")
def at_once(opened: tuple[Config, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Life:
    """All texts in one write. Only for looking at."""
    made = Life(*opened, tmp_path_factory.mktemp("whole"))
    assert made.write(TEXTS).codec == "product"
    return made


@pytest.fixture(scope="module")
def mixed(opened: tuple[Config, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Life:
    """A bank of a codec that would spoil some of the texts, which stay in int8. Only for looking at."""
    made = Life(*opened, tmp_path_factory.mktemp("mixed"))
    made.write(ALIKE, sample_tokens=900)
    made.write(TEXTS)
    assert made.kinds().keys() == {"scalar", "product"}
    return made


class TestBeginning:
    @pytest.mark.parametrize("first", [1, 5, 17])
    def test_a_bank_answers_alike_whatever_it_began_with(self, life: Life, at_once: Life, first: int) -> None:
        assert life.write(TEXTS[:first]).codec is None
        assert life.kinds() == {"scalar": first}
        assert max(life.errors().values()) < 1e-4
        assert life.write(TEXTS).codec == "product"
        mine, theirs = life.errors(), at_once.errors()
        assert mine.keys() == theirs.keys()
        assert fmean(mine.values()) < 1.5 * fmean(theirs.values())
        assert max(mine.values()) < 1.5 * max(theirs.values())

    def test_look_alikes_first_do_not_spoil_the_others(self, life: Life, at_once: Life) -> None:
        assert life.write(ALIKE, sample_tokens=900).codec == "product"
        assert life.write(TEXTS).codec is None
        kinds = life.kinds()
        assert kinds["scalar"] > len(TEXTS) / 2  # what is unlike the sample
        worst = max(at_once.errors().values())
        assert all(error < 1.5 * worst for text, error in life.errors().items() if text in TEXTS)

    def test_a_small_bank_has_no_codec_to_store(self, life: Life) -> None:
        report = life.write(TEXTS[:3])
        stored = life.look(lambda bank: sum(path.stat().st_size for path, _ in bank.codecs.files()))
        assert stored < 2000
        assert report.bytes == verify(life.config).bytes

    def test_the_bytes_of_all_blocks_are_counted(self, life: Life) -> None:
        report = life.write(TEXTS)
        assert report.written == len(TEXTS)
        assert report.known == 0
        assert report.reencoded > 0
        assert report.bytes == verify(life.config).bytes
        again = life.write(TEXTS)
        assert (again.written, again.known, again.bytes, again.codec) == (0, len(TEXTS), 0, None)

    def test_too_little_to_train_on_stays_in_int8(self, life: Life) -> None:
        assert life.write(TEXTS[:2], sample_tokens=60).codec is None  # trained, and found wanting
        assert life.kinds() == {"scalar": 2}
        assert not (life.config.bank / TRAINING).exists()
        assert life.write(TEXTS[:3]).codec is None
        assert life.write(TEXTS, sample_tokens=TOKENS).codec == "product"

    def test_a_catalogue_is_not_trained_on(self, life: Life) -> None:
        documents = [Document(f"text {text}", text) for text in TEXTS]
        writer = Writer(life.config, life.adapter, assembly.open_embedder(life.config))
        assert writer.write(documents, whole=True, catalogue=True).catalogued == len(TEXTS)
        assert life.write(TEXTS).codec == "product"
        assert sum(life.kinds().values()) == len(TEXTS)

    def test_another_codec_is_refused(self, life: Life) -> None:
        life.write(TEXTS[:3])
        with pytest.raises(BankMismatchError, match="m3 codec refit"):
            life.write(TEXTS, bytes=8)


class Stopping(Steps):
    """Interrupts the training when a step is asked for that is not kept, but for the first few."""

    left = 3

    def take(self, name: str, work: Any) -> Any:
        def counted() -> Any:
            if type(self).left == 0:
                raise KeyboardInterrupt
            type(self).left -= 1
            return work()

        return super().take(name, counted)


def test_an_interrupted_training_goes_on(life: Life, at_once: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr("m3runtime.writing.codec_training.Steps", Stopping)
        while True:
            Stopping.left = 3
            try:
                life.write(TEXTS)
                break
            except KeyboardInterrupt:
                stops += 1
                assert set(life.kinds()) == {"scalar"}
                assert verify(life.config).clean
    assert stops > 1
    fingerprint = [one.look(lambda bank: bank.manifest.codec) for one in (life, at_once)]
    assert fingerprint[0] == fingerprint[1]
    assert not (life.config.bank / TRAINING).exists()


class TestMixed:
    def test_recall_reads_blocks_of_both_codecs(self, mixed: Life) -> None:
        with Runtime.open(mixed.config, read_only=True) as runtime:
            stream = runtime.stream(torch.float32)
            kinds = set()
            for text in (*TEXTS[::9], *ALIKE[:3]):
                recalled = stream.recall(text)
                for row, (id, reference) in enumerate(zip(recalled.ids, recalled.references, strict=True)):
                    slot = torch.zeros(1, runtime.bank.home.slot_bytes, dtype=torch.uint8)
                    assert runtime.bank.home.read(np.array([id], np.uint64), slot)[0]
                    kinds.add(runtime.bank.codecs.of(block.headers(slot.numpy())[0]).kind)
                    alone = runtime.bank.decode(slot, torch.float32)
                    (keys, _) = recalled.parts[row]
                    torch.testing.assert_close(keys, alone.keys[0])
                    assert reference.text in (*TEXTS, *ALIKE)
            assert kinds == {"scalar", "product"}

    def test_tiers_hold_the_blocks_that_fit_and_the_others_come_from_the_home(self, mixed: Life) -> None:
        with Runtime.open(mixed.config, read_only=True) as runtime:
            assert runtime.hierarchy.tiers[0].slot_bytes < runtime.bank.home.slot_bytes
            ids = runtime.bank.home.ids()
            out = torch.zeros(len(ids), runtime.bank.home.slot_bytes, dtype=torch.uint8)
            for _ in range(2):
                assert runtime.hierarchy.read(ids, out).all()
                for id, row in zip(ids.tolist(), out.numpy(), strict=True):
                    block.check(row, id=id, stamp=runtime.bank.codecs)
            held = runtime.hierarchy.held(ids)
            long = block.headers(out.numpy())["payload"] + block.HEADER_BYTES > runtime.hierarchy.tiers[0].slot_bytes
            assert held.any()
            assert not held[long].any()

    def test_all_memories_decoded_in_one_call_are_those_decoded_alone(self, mixed: Life) -> None:
        def work(bank: Bank) -> None:
            ids = bank.home.ids()
            rows = torch.zeros(len(ids), bank.home.slot_bytes, dtype=torch.uint8)
            bank.home.read(ids, rows)
            together = bank.decode(rows, torch.float32)
            for row in range(len(ids)):
                alone = bank.decode(rows[row : row + 1], torch.float32)
                own = int(alone.tokens[0])
                assert torch.equal(together.keys[row, :, :, :own], alone.keys[0])
                assert torch.equal(together.values[row, :, :, :own], alone.values[0])
                assert not together.keys[row, :, :, own:].any()

        mixed.look(work)

    def test_a_process_that_was_open_reads_blocks_of_a_later_codec(self, life: Life) -> None:
        life.write(TEXTS[:5])
        old = life.look(lambda bank: bank.manifest)
        life.write(TEXTS)
        load = partial(assembly.load_codec, life.config)

        def work(bank: Bank) -> None:
            newest = bank.home.ids()[-1:]
            slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
            assert bank.home.read(newest, slot)[0]
            before = BankCodecs(bank.path, old, load, partial(Manifest.read, bank.path, bank.home))
            assert [codec.kind for codec in before.all] == ["scalar"]
            block.check(slot[0].numpy(), id=int(newest[0]), stamp=before)
            assert torch.equal(before.decode(slot, torch.float32).keys, bank.decode(slot, torch.float32).keys)
            assert [codec.kind for codec in before.all] == ["product", "scalar"]
            deaf = BankCodecs(bank.path, old, load)
            with pytest.raises(BlockError, match="was encoded by another codec"):
                deaf.decode(slot, torch.float32)

        life.look(work)


class TestRefit:
    def test_a_bank_with_a_spoilt_codec_is_made_well(self, life: Life, at_once: Life, tmp_path: Path) -> None:
        """As banks of earlier releases are: a codec that was trained on a single reference, and no other."""
        first = Life(life.config, life.adapter, tmp_path / "first")
        codec = assembly.make_codec(life.config, life.adapter.spec)
        codec.fit(life.adapter.encode(TEXTS[:1]))
        codec.save(tmp_path / "spoilt.safetensors")
        life.write(TEXTS, file=tmp_path / "spoilt.safetensors")
        assert life.look(lambda bank: (bank.manifest.planned, bank.manifest.others)) == (None, ())
        slot = life.look(lambda bank: bank.home.slot_bytes)
        spoilt = fmean(life.errors().values())
        life.config = life.config.model_copy(update={"codec": first.config.codec})
        report = refit(life.config)
        assert (report.codec, report.planned, report.left) == ("product", False, 0)
        assert len(report.encoded) == len(TEXTS)
        assert fmean(life.errors().values()) < spoilt / 1.5
        assert max(life.errors().values()) < 1.5 * max(at_once.errors().values())
        assert life.look(lambda bank: bank.home.slot_bytes) > slot
        assert life.look(lambda bank: [one.kind for one in bank.manifest.others]) == ["scalar"]
        assert sorted(life.look(lambda bank: [one.text for one in bank.home.references(bank.home.ids())])) == sorted(
            TEXTS
        )
        with Runtime.open(life.config, read_only=True) as runtime:
            assert runtime.search([TEXTS[3]])[0][0].id in report.encoded.values()

    def test_what_is_in_int8_is_encoded_without_the_model(self, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
        life.write(TEXTS, sample_tokens=10**6)
        assert life.kinds() == {"scalar": len(TEXTS)}
        life.configure(sample_tokens=TOKENS)
        with monkeypatch.context() as patch:
            patch.setattr(type(life.adapter), "encode", lambda *_: pytest.fail("the model was used"))
            patch.setattr(type(life.adapter), "importance", lambda *_: None)
            report = refit(life.config)
        assert report.codec == "product"
        assert life.kinds().get("scalar", 0) == report.left < len(TEXTS) / 4

    def test_it_goes_on_where_it_was_interrupted(self, life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
        life.write(TEXTS[:40], sample_tokens=1000)
        life.configure(bytes=8)
        real = reencoding._replace
        calls = Counter[str]()

        def stopping(bank: Any, memories: Any) -> Any:
            calls["all"] += 1
            if calls["all"] == 3:
                raise KeyboardInterrupt
            return real(bank, memories)

        with monkeypatch.context() as patch:
            patch.setattr(reencoding, "_replace", stopping)
            with pytest.raises(KeyboardInterrupt):
                refit(life.config)
        halfway = life.look(lambda bank: (bank.manifest.codec, len(bank.codecs.all)))
        assert halfway[1] == 3
        assert verify(life.config).clean
        assert len(life.errors()) == 40
        report = refit(life.config)
        assert report.fingerprint == halfway[0]
        assert 0 < len(report.encoded) < 40
        assert life.look(lambda bank: len(bank.codecs.all)) == 2
        assert verify(life.config).clean
        assert len(list(life.config.bank.glob("codec-*"))) == 1

    def test_too_little_to_train_on_becomes_int8(self, life: Life, tmp_path: Path) -> None:
        learns, plain = life.config.codec, CodecConfig(kind="raw")
        life.config = life.config.model_copy(update={"codec": plain})
        life.write(TEXTS[:4])
        life.config = life.config.model_copy(update={"codec": learns})
        report = refit(life.config)
        assert (report.codec, report.planned, len(report.encoded)) == ("scalar", True, 4)
        assert life.write(TEXTS).codec == "product"

    def test_to_a_codec_that_learns_nothing(self, life: Life) -> None:
        life.write(TEXTS)
        life.config = life.config.model_copy(update={"codec": CodecConfig(kind="raw")})
        report = refit(life.config)
        assert (report.codec, report.left, len(report.encoded)) == ("raw", 0, len(TEXTS))
        assert life.look(lambda bank: (bank.manifest.planned, bank.manifest.others)) == (None, ())
        assert life.kinds() == {"raw": len(TEXTS)}
        assert max(life.errors().values()) < 1e-3


def test_the_commands_say_what_a_bank_has(new_place: NewPlace, tmp_path: Path) -> None:
    place: Place = new_place(tmp_path / "commands")
    place.configure(memory={"reference_tokens": 96}, codec=None, embedder={"dim": 16})
    place.configure(codec={"kind": "product", "bytes": 6, "sample_tokens": TOKENS})
    place.text("first.txt", TEXTS[0])
    place.text("all.txt", "\n\n".join(TEXTS))
    assert place.m3("write", "first.txt", "--json").json["codec"] is None
    facts = place.m3("inspect", "--json").json
    assert (facts["codec"]["kind"], facts["planned_codec"]["kind"]) == ("scalar", "product")
    result = place.m3("write", "all.txt")
    assert "the codec (product) was trained" in result.out
    facts = place.m3("inspect", "--json").json
    assert facts["codec"]["kind"] == "product"
    assert [one["kind"] for one in facts["other_codecs"].values()] == ["scalar"]
    assert "planned_codec" not in facts
    assert facts["codec_bytes"] > 1000
    (last,) = place.m3("search", TEXTS[-1], "-k", 1, "--json").json
    assert place.m3("inspect", str(last["id"]), "--json").json["codec"] == "product"
    assert sum(place.m3("verify", "--json").json["codecs"].values()) == facts["memories"]
    assert place.m3("codec", "report", "--json").json["kind"] == "product"
    result = place.m3("codec", "refit")
    assert result.code == 0, result.err
    assert "memories encoded anew by product" in result.out
    place.text("odd.txt", "\n\n".join(ALIKE))
    assert place.m3("write", "odd.txt").code == 0
    result = place.m3("verify")
    assert result.code == 0
    assert "blocks by codec" in result.out
    assert place.m3("ask", "Who saw the lamp?").code == 0


@pytest.mark.parametrize("damage", [b"", b"half"])
def test_a_damaged_codec_is_named(life: Life, damage: bytes) -> None:
    life.write(TEXTS)
    (path,) = life.config.bank.glob("codec-*")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2] if damage else b"")
    report = verify(life.config)
    assert [one.where for one in report.damage] == ["codec"]
    assert path.name in report.damage[0].what
