"""``m3 export`` and ``m3 import``: a bank as a file, and back."""

import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.exchange.export import exported
from m3runtime.bank.exchange.files import read_records, write_records
from m3runtime.bank.exchange.record import Record
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place as ReferencePlace
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.writing.importing import import_records
from tests.end_to_end.commands import Place, contents
from tests.end_to_end.conftest import NewPlace

FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)
PLACES = st.builds(
    ReferencePlace,
    st.sampled_from(["a.txt", "b/東京.md", "../c d.pdf"]),
    st.integers(0, 9),
    st.integers(9, 2**40),
    st.dictionaries(st.sampled_from(["page", "record", "url"]), TEXTS),
)
VECTORS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)


@st.composite
def recorded(draw: st.DrawFn) -> tuple[int, Record]:
    places = tuple(draw(st.lists(PLACES, min_size=1, max_size=3)))
    one = Reference(draw(TEXTS), draw(st.integers(0, 65_535)), draw(TEXTS | st.just("")), places)
    if draw(st.booleans()):
        return draw(st.integers(0, 2**63)), Record(one, np.array(draw(VECTORS), np.float32), "f" * 32)
    return draw(st.integers(0, 2**63)), Record(one)


def plain(record: Record) -> tuple[object, ...]:
    one = record.reference
    vector = None if record.embedding is None else record.embedding.tobytes()
    return one.text, one.tokens, one.heading, one.places, vector, record.embedder


@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=25)
@given(made=st.lists(recorded(), max_size=5))
def test_records_come_back_as_they_were(suffix: str, made: list[tuple[int, Record]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        write_records(path, iter(made))
        assert [plain(one) for one in read_records(path)] == [plain(one) for _, one in made]
        assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def adapter(new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, Adapter]]:
    place = new_place(tmp_path_factory.mktemp("exchange"))
    place.configure(memory={"layers": [0], "reference_tokens": 96}, codec={"kind": "raw"}, embedder={"dim": 16})
    config = Config.load(place.file, environ={})
    adapter = assembly.open_adapter(config)
    yield config, adapter
    adapter.close()


@settings(max_examples=6)
@given(made=st.lists(recorded(), min_size=1, max_size=4), catalogue=st.booleans())
def test_a_bank_that_is_exported_and_imported_is_the_same(
    adapter: tuple[Config, Adapter], made: list[tuple[int, Record]], catalogue: bool
) -> None:
    settings, model = adapter
    embedder = assembly.open_embedder(settings)

    def brought(records: Iterator[Record], bank: Path) -> list[tuple[object, ...]]:
        config = settings.model_copy(update={"bank": bank})
        import_records(config, model, embedder, records, catalogue=catalogue)
        write_records(bank.with_suffix(".jsonl"), records_of(config))
        return sorted(plain(one) for _, one in records_of(config))

    with tempfile.TemporaryDirectory() as folder:
        first = brought((replace(one, embedder="another") for _, one in made), Path(folder, "one"))
        assert {one[0] for one in first} == {one.reference.text for _, one in made}
        assert brought(read_records(Path(folder, "one.jsonl")), Path(folder, "two")) == first


def records_of(config: Config) -> Iterator[tuple[int, Record]]:
    damaged: dict[int, str] = {}
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        yield from exported(bank.home, bank.manifest.embedder, bank.manifest.dim, damaged)
    assert not damaged


@pytest.mark.parametrize("suffix", FORMATS)
def test_into_another_bank(written: Place, place: Place, suffix: str) -> None:
    path = place.folder / f"a{suffix}"
    out = written.m3("export", path, "--json").json
    before = written.contents()
    assert out == {"references": len(before.texts), "damaged": [], "file": str(path)}
    result = place.m3("import", path, "--json").json
    assert (result["written"], result["embeddings_taken"]) == (len(before.texts), len(before.texts))
    after = place.contents()
    assert after.references == before.references
    assert after.embeddings == before.embeddings
    again = place.m3("import", path, "--json").json
    assert (again["written"], again["known"]) == (0, len(before.texts))
    assert place.contents() == after


def test_another_embedder_computes_its_own(written: Place, place: Place) -> None:
    path = place.folder / "a.jsonl"
    assert written.m3("export", path).code == 0
    place.configure(embedder={"salt": "other"})
    assert place.m3("import", path, "--json").json["embeddings_taken"] == 0
    assert place.contents().texts == written.contents().texts


def test_embeddings_may_be_left_out(written: Place) -> None:
    assert written.m3("export", "a.jsonl", "--no-embeddings").code == 0
    lines = (written.folder / "a.jsonl").read_text().splitlines()
    assert all(json.loads(line).keys() == {"id", "text", "heading", "tokens", "places"} for line in lines)


def test_what_other_programs_write(place: Place) -> None:
    place.text(
        "a.jsonl", '{"text": "A heron nests.", "score": 3}\n\n{"text": "An owl sleeps.\\n", "heading": "Birds"}\n'
    )
    assert "2 references catalogued" in place.m3("import", "a.jsonl", "--catalogue").out
    assert place.m3("import", "a.jsonl", "--json").json["written"] == 2
    found = place.m3("search", "owl", "-k", "1", "--json").json[0]
    assert (found["source"], found["heading"]) == ("a.jsonl:2", "Birds")


def test_places_are_added(written: Place) -> None:
    (id, text), *_ = written.contents().texts.items()
    count = len(written.contents().references[id].places)
    written.text("a.jsonl", json.dumps({"text": text, "heading": written.contents().references[id].heading}))
    assert written.m3("import", "a.jsonl", "--json").json["known"] == 1
    after = contents(written.file).references[id]
    assert [place.source for place in after.places][count:] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "a.txt: name a file that ends in .jsonl"),
        ("a.jsonl", b'{"text": "fine"}\n{', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n[]', "a.jsonl, record 2 is not an object"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, record 1: text must"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl, record 1: text is blank"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half a character"),
        ("a.jsonl", b'{"text": "a", "places": [{"source": 3}]}', "record 1: source must"),
        ("a.jsonl", b"\x89\0", "is a binary file"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-9], "is damaged or no gzip file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "fine"}\n' * 9)[:-9], "is cut off"),
        ("a.parquet", b"PAR1 no", "is damaged or no Parquet file"),
        ("none.jsonl", None, "none.jsonl cannot be read"),
    ],
)
def test_a_file_that_cannot_be_imported(place: Place, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        place.text(name, content)
    assert message in place.m3("import", name).complaint
    assert not place.bank.exists()


def test_texts_and_embeddings_that_do_not_fit(place: Place) -> None:
    place.text("long.jsonl", json.dumps({"text": "word " * 500 + "end"}))
    assert "long.jsonl:1: " in (complaint := place.m3("import", "long.jsonl").complaint)
    assert "m3 write" in complaint
    embedder = assembly.open_embedder(Config.load(place.file, environ={}))
    line = {"text": "A heron nests.", "embedding": [1.0, 1.0], "embedder": embedder.fingerprint}
    place.text("short.jsonl", json.dumps(line))
    assert "no vector of length 1 in 256 numbers" in place.m3("import", "short.jsonl").complaint
    assert not (place.bank / "home").exists()


def test_an_export_that_fails_leaves_the_old_file(written: Place) -> None:
    written.text("a.parquet", b"old")
    source = ReferencePlace("\udcff.txt", 0, 1)
    with pytest.raises(InputError, match="not UTF-8"):
        write_records(written.folder / "a.parquet", iter([(1, Record(Reference("a", 1, "", (source,))))]))
    assert (written.folder / "a.parquet").read_bytes() == b"old"
    write_records(written.folder / "a.jsonl", iter([(1, Record(Reference("a", 1, "", (source,))))]))
    (one,) = read_records(written.folder / "a.jsonl")
    assert one.reference.source == source.source


def test_no_library_for_parquet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'm3runtime\[parquet\]'"):
        write_records(tmp_path / "a.parquet", iter(()))
    assert not list(tmp_path.iterdir())
