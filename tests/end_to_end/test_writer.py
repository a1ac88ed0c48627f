"""Laws of `Writer` over any documents."""

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from m3backends.lmdb.home import LmdbHome
from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.codecs import BankCodecs
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.memory.block import as_ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.writing.encoding import GROUP
from m3runtime.writing.pipeline import Pipeline
from m3runtime.writing.verification import verify
from m3runtime.writing.writer import Writer, WriteReport
from tests.end_to_end.commands import Contents, Place, contents
from tests.end_to_end.conftest import NewPlace

# Few words, so that paragraphs are often equal; the long one has to be split.
PARAGRAPHS = ["The lamp burns oil.", "A heron nests.", "Two words", "Ünï 😀 東京", "The bell rings. " * 30]
TEXTS = st.lists(
    st.sampled_from(PARAGRAPHS) | st.text(st.sampled_from("ab é.\n東"), max_size=30), min_size=1, max_size=4
).map("\n\n".join)
CORPORA = st.lists(TEXTS, min_size=1, max_size=4)
# What a writer is made of is loaded once and changes with no example.
FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Desk:
    """A writer over a new bank each time."""

    def __init__(self, config: Config, adapter: Adapter) -> None:
        self.config = config
        self.adapter = adapter
        self.embedder = assembly.open_embedder(config)

    def write(
        self, bank: Path, texts: Sequence[str], *, whole: bool = False, parallel: bool | None = None
    ) -> WriteReport:
        config = self.config.model_copy(update={"bank": bank})
        documents = [Document(f"text {number}", text) for number, text in enumerate(texts)]
        return Writer(config, self.adapter, self.embedder, parallel=parallel).write(documents, whole=whole)

    def references(self, bank: Path) -> list[Reference]:
        """In the order of ids, which have no gaps."""
        opened = assembly.open_bank(self.config.model_copy(update={"bank": bank}), read_only=True)
        try:
            ids = opened.home.ids().tolist()
            assert ids == list(range(len(ids)))
            found = [one for one in opened.home.references(as_ids(ids)) if one is not None]
            assert len(found) == len(ids)
            return found
        finally:
            opened.close()

    def memories(self, bank: Path) -> MemoryTensors:
        """In the order of ids."""
        opened = assembly.open_bank(self.config.model_copy(update={"bank": bank}), read_only=True)
        with closing(opened):
            ids = opened.home.ids()
            slots = torch.zeros(len(ids), opened.home.slot_bytes, dtype=torch.uint8)
            assert opened.home.read(ids, slots).all()
            return opened.decode(slots, torch.float32)

    def manifest(self, bank: Path) -> Manifest:
        with closing(assembly.open_bank(self.config.model_copy(update={"bank": bank}), read_only=True)) as opened:
            return opened.manifest


@pytest.fixture(scope="module")
def desk(new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    place: Place = new_place(tmp_path_factory.mktemp("desk"))
    place.configure(memory={"layers": [0], "reference_tokens": 96}, codec={"kind": "raw"}, embedder={"dim": 16})
    config = Config.load(place.file, environ={})
    adapter = assembly.open_adapter(config)
    yield Desk(config, adapter)
    adapter.close()


@pytest.fixture
def bank() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def usable(texts: Sequence[str]) -> list[str]:
    """Those of more than a word."""
    return [text for text in texts if len(text.split()) > 1]


@pytest.fixture
def section() -> str:
    """Of several passages, of which the last has no heading in its text."""
    return "# Ships\n\n## The heron\n\n" + "\n\n".join(f"It has {n} masts and sails at noon. " * 3 for n in range(9))


def test_the_model_reads_a_text_below_its_headings(desk: Desk, bank: Path, section: str) -> None:
    desk.write(bank, [section])
    references, memories = desk.references(bank), desk.memories(bank)
    assert "heron" not in references[-1].text
    for row, one in enumerate(references):
        read = desk.adapter.encode([one.headed_within(96, desk.adapter.count_tokens)])
        count = int(read.tokens)
        assert memories.tokens[row] == count
        torch.testing.assert_close(memories.keys[row, :, :, :count], read.keys[0].float(), atol=0.02, rtol=0.02)
    assert memories.tokens[-1] > references[-1].tokens
    assert verify(desk.config.model_copy(update={"bank": bank})).clean


def test_a_bank_of_an_earlier_release_stays_as_it_was_begun(
    desk: Desk, bank: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("m3runtime.writing.writer.Manifest", lambda **fields: Manifest(**{**fields, "headings": False}))
        desk.write(bank, ["A first text."])
    begun = desk.manifest(bank)
    assert begun.format == 1
    assert b"headings" not in begun.to_bytes()
    assert replace(begun, headings=True).stamp != begun.stamp
    desk.write(bank, ["A first text.", section])
    assert desk.manifest(bank) == begun
    references, memories = desk.references(bank), desk.memories(bank)
    assert references[-1].heading == "Ships > The heron"
    assert memories.tokens.tolist() == [one.tokens for one in references]


@FEW
@given(texts=CORPORA)
@example(texts=["The lamp burns oil.", "The lamp burns oil.\n\nA heron nests.", "A heron nests."])
def test_each_text_is_remembered_once_in_the_order_of_the_corpus(desk: Desk, texts: list[str]) -> None:
    texts = usable(texts)
    assume(texts)
    with tempfile.TemporaryDirectory() as folder:
        report = desk.write(Path(folder), texts)
        references = desk.references(Path(folder))
        again = desk.write(Path(folder), texts)
        assert desk.references(Path(folder)) == references
        desk.write(Path(folder), texts[::-1])
        assert [one.text for one in desk.references(Path(folder))] == [one.text for one in references]
    passages = [
        passage.text
        for text in texts
        for passage in Writer(desk.config, desk.adapter, desk.embedder).splitter.split(text)
    ]
    assert [reference.text for reference in references] == list(dict.fromkeys(passages))
    assert (report.documents, report.written, report.known) == (len(texts), len(references), 0)
    assert (again.documents, again.written, again.known, again.bytes) == (len(texts), 0, len(references), 0)


@FEW
@given(texts=CORPORA, whole=st.booleans())
def test_spans_index_the_text_of_their_source(desk: Desk, texts: list[str], whole: bool) -> None:
    texts = [text for text in usable(texts) if not whole or desk.adapter.count_tokens(text.strip()) <= 96]
    assume(texts)
    with tempfile.TemporaryDirectory() as folder:
        desk.write(Path(folder), texts, whole=whole)
        references = desk.references(Path(folder))
    for reference in references:
        source = texts[int(reference.source.split()[1])]
        assert source[reference.start : reference.end] == reference.text == reference.text.strip() != ""
        assert reference.tokens == desk.adapter.count_tokens(reference.text) <= 96
    if whole:
        assert [reference.text for reference in references] == list(dict.fromkeys(text.strip() for text in texts))


@FEW
@given(texts=st.lists(TEXTS, min_size=2, max_size=4), cut=st.integers(0, 3))
def test_in_two_parts_it_is_the_same(desk: Desk, texts: list[str], cut: int) -> None:
    texts = usable(texts)
    assume(len(texts) > 1)
    first = texts[: 1 + cut % (len(texts) - 1)]
    with tempfile.TemporaryDirectory() as together, tempfile.TemporaryDirectory() as apart:
        desk.write(Path(together), texts)
        desk.write(Path(apart), first)
        desk.write(Path(apart), texts)
        assert desk.references(Path(apart)) == desk.references(Path(together))


def test_a_document_that_is_too_long_to_be_whole(desk: Desk, bank: Path) -> None:
    long = "The bell rings. " * 60
    with pytest.raises(InputError, match=r"text 1: \d+ tokens, but a reference has at most 96"):
        desk.write(bank / "bank", ["A heron nests.", long], whole=True)
    assert not (bank / "bank").exists()
    assert desk.write(bank / "bank", ["A heron nests.", long]).written > 2


@pytest.mark.parametrize("text", ["Heron", " heron.\n", "https://heron.example/nests", "鷺"])
def test_a_text_of_one_word(desk: Desk, bank: Path, text: str) -> None:
    assert desk.write(bank / "bank", ["A heron nests.", text]).written == 2
    assert [reference.text for reference in desk.references(bank / "bank")] == ["A heron nests.", text.strip()]


def test_no_documents(desk: Desk, bank: Path) -> None:
    with pytest.raises(InputError, match="the corpus is empty"):
        desk.write(bank / "bank", [])
    assert not (bank / "bank").exists()


def test_progress_counts_every_reference(desk: Desk, bank: Path) -> None:
    said: list[tuple[str, int, int]] = []
    documents = [Document("all", f"Heron number {number} nests.") for number in range(150)]
    config = desk.config.model_copy(update={"bank": bank / "bank"})
    writer = Writer(config, desk.adapter, desk.embedder)
    writer.write(documents, progress=lambda *words: said.append(words))
    assert said[0] == ("Writing memories", 0, 150)
    assert said[-1] == ("Writing memories", 150, 150)
    assert said == sorted(said)
    said.clear()
    writer.write([*documents, Document("more", "One more heron nests.")], progress=lambda *words: said.append(words))
    assert list(dict.fromkeys(said)) == [("Writing memories", 150, 151), ("Writing memories", 151, 151)]


class Alive:
    """An embedder that counts how many references are in memory while it works."""

    def __init__(self, real: Embedder) -> None:
        self.real = real
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        self.most = max(self.most, sum(type(one) is Reference for one in gc.get_objects()))
        return self.real.embed_references(texts)


@pytest.mark.parametrize("catalogue", [False, True])
def test_no_more_than_a_few_groups_are_in_memory(desk: Desk, bank: Path, catalogue: bool) -> None:
    documents = (Document(f"{n}", f"Heron number {n} nests.") for n in range(20 * GROUP))
    config = desk.config.model_copy(update={"bank": bank / "bank"})
    embedder = Alive(desk.embedder)
    gc.freeze()  # what there was before need not be looked through
    try:
        writer = Writer(config, desk.adapter, cast(Embedder, embedder), parallel=True)
        report = writer.write(documents, catalogue=catalogue)
    finally:
        gc.unfreeze()
    assert report.references == 20 * GROUP
    assert 0 < embedder.most <= 6 * GROUP


def test_a_mistake_in_the_last_document_shows_before_anything_is_written(desk: Desk, bank: Path) -> None:
    desk.write(bank / "bank", ["A heron nests."])
    before = stored(desk, bank / "bank")
    with pytest.raises(InputError, match="half a character"):
        desk.write(bank / "bank", [*(f"Heron number {n} nests." for n in range(3 * GROUP)), "A \ud800 nests."])
    assert stored(desk, bank / "bank") == before


def test_cold_and_new_references_are_told_apart_in_each_group(desk: Desk, bank: Path) -> None:
    """What is catalogued is filled under its own id, in groups as full as those of the new references between."""
    config = desk.config.model_copy(update={"bank": bank / "bank"})
    writer = Writer(config, desk.adapter, desk.embedder)
    texts = [f"Heron number {n} nests in tree {n}." for n in range(4 * GROUP)]
    catalogued = writer.write([Document("some", text) for text in texts[::2]], catalogue=True)
    assert (catalogued.catalogued, catalogued.written, catalogued.bytes) == (2 * GROUP, 0, 0)
    desk.write(bank / "bank", texts[:4])
    report = desk.write(bank / "bank", texts)
    assert (report.known, report.written, report.catalogued) == (4, 4 * GROUP - 4, 0)
    assert [one.text for one in desk.references(bank / "bank")] == [*texts[::2], *texts[1::2]]
    assert len(stored(desk, bank / "bank").blocks) == 4 * GROUP


# -- phases in parallel --------------------------------------------------------------------------------------------

MANY = [f"Heron number {number} nests in tree {number * 37 % 100}." for number in range(2 * GROUP + 9)]
"""Three groups."""


class Failing:
    """What raises `InputError` the ``after``-th time that it is asked, and else asks the ``real`` one."""

    def __init__(self, real: Callable[..., Any], after: int) -> None:
        self.real = real
        self.left = after

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise InputError("it failed as asked")
        return self.real(*arguments, **named)


def stored(desk: Desk, bank: Path) -> Contents:
    file = bank.parent / "m3.yaml"
    Place(bank.parent).configure(**desk.config.model_copy(update={"bank": bank}).model_dump(mode="json"))
    return contents(file)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, GROUP + 1, len(MANY)])
def test_phases_in_parallel_write_the_same_bytes(desk: Desk, bank: Path, count: int) -> None:
    for name, parallel in (("in turn", False), ("parallel", True)):
        desk.write(bank / name / "bank", MANY[:count], parallel=parallel)
    one, other = (stored(desk, bank / name / "bank") for name in ("in turn", "parallel"))
    assert one == other
    assert one.next_id == count


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("where", "after", "committed"),
    [
        ("model", 1, {0}),
        ("model", 7, {0, GROUP}),
        ("codec", 1, {0}),
        ("codec", 6, {0, GROUP}),
        ("embedder", 1, {0}),
        ("embedder", 3, {GROUP, 2 * GROUP}),
        ("home", 1, {0}),
        ("home", 2, {GROUP}),
        ("home", 3, {2 * GROUP}),
    ],
)
def test_an_error_in_any_phase_comes_out_and_leaves_whole_groups(
    desk: Desk, bank: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: int, committed: set[int], parallel: bool
) -> None:
    owner, name = {
        "model": (desk.adapter, "encode"),
        "codec": (BankCodecs, "seal"),
        "embedder": (desk.embedder, "embed_references"),
        "home": (LmdbHome, "commit"),
    }[where]
    real = getattr(owner, name)
    failing = Failing(real, after)
    with monkeypatch.context() as patched:
        # As a function where it becomes a method of a class.
        patched.setattr(owner, name, (lambda *of, **by: failing(*of, **by)) if isinstance(owner, type) else failing)
        with pytest.raises(InputError, match="it failed as asked"):
            desk.write(bank / "bank", MANY, parallel=parallel)
    left = stored(desk, bank / "bank")
    assert left.next_id in committed
    again = desk.write(bank / "bank", MANY, parallel=parallel)
    assert (again.known, again.written) == (left.next_id, len(MANY) - left.next_id)
    desk.write(bank / "whole" / "bank", MANY)
    assert stored(desk, bank / "bank") == stored(desk, bank / "whole" / "bank")


@pytest.mark.parametrize("seed", range(6))
def test_an_interrupt_while_groups_are_committed_leaves_whole_ones(desk: Desk, bank: Path, seed: int) -> None:
    def write(moment: int) -> int:
        """Interrupted at a call of a function, by Python's own count from the first group on to the last one's end."""
        calls = 0

        def watch(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls
            if frame.f_code is Pipeline.run.__code__ and event == "return":
                sys.setprofile(None)
            elif calls or frame.f_code is Pipeline.run.__code__:
                calls += 1
                if calls == moment:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(watch)
        try:
            desk.write(bank / f"{moment}" / "bank", MANY, parallel=True)
        finally:
            sys.setprofile(None)
        return calls

    end = write(0)
    whole = stored(desk, bank / "0" / "bank")
    moment = Random(seed).randrange(1, end - 100)
    with pytest.raises(KeyboardInterrupt):
        write(moment)
    left = stored(desk, bank / f"{moment}" / "bank")
    assert left.next_id % GROUP == 0
    desk.write(bank / f"{moment}" / "bank", MANY)
    assert stored(desk, bank / f"{moment}" / "bank") == whole
