"""``m3 codec``, and banks whose codec comes from a file."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from m3runtime.codecs.raw import RawCodec
from m3runtime.errors import CodecError, PluginError
from m3runtime.testing.codec import SPEC
from m3runtime.writing.codec_files import load_any
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import NewPlace

faiss = pytest.importorskip("faiss")

RESIDUAL = {"kind": "product", "keys": "4x8", "values": "2x8", "scope": "model", "rotation": "none", "offset": False}
FIT = ("codec", "fit", "--corpus", "facts", "--out", "own.safetensors")
IMPORT = ("codec", "import", "--keys", "keys.faiss", "--values", "values.faiss", "--out", "made.safetensors")
EXPORT = ("codec", "export", "own.safetensors", "--keys", "keys.faiss", "--values", "values.faiss")


def set_codec(place: Place, **codec: Any) -> None:
    """Exactly these keys."""
    place.configure(codec=None)
    place.configure(codec=codec)


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> tuple[Place, dict[str, Any]]:
    """A trained codec in ``own.safetensors``, and what `fit` said of it. Only for looking at."""
    place = new_place(tmp_path_factory.mktemp("fitted"))
    place.facts()
    set_codec(place, **RESIDUAL)
    result = place.m3(*FIT, "--json")
    assert result.err == ""
    return place, result.json


@pytest.fixture
def said(fitted_once: tuple[Place, dict[str, Any]]) -> dict[str, Any]:
    return fitted_once[1]


@pytest.fixture
def fitted(fitted_once: tuple[Place, dict[str, Any]], tmp_path: Path) -> Place:
    """A place with a trained codec, which a test may change."""
    shutil.copytree(fitted_once[0].folder, tmp_path / "fitted")
    return Place(tmp_path / "fitted")


def names(place: Place) -> set[str]:
    return {path.name for path in place.folder.iterdir()}


class TestFit:
    def test_what_it_says(self, fitted: Place, said: dict[str, Any]) -> None:
        size = (fitted.folder / "own.safetensors").stat().st_size
        spec = said["spec"]
        vectors = len(spec["layers"]) * spec["kv_heads"]
        assert said["kind"] == "product"
        assert {"kind": "product", **said["options"]}.items() >= RESIDUAL.items()
        assert said["file_bytes"] == size
        assert said["token_bytes"] == 6 * vectors
        assert said["reference_bytes"] == 6 * vectors * spec["tokens"]
        assert said["times_fewer"] == pytest.approx(4 * spec["head_dim"] / 6)
        assert 0 <= said["key_error"] < 2
        assert 0 <= said["value_error"] < 2
        assert names(fitted) == {"facts", "m3.yaml", "own.safetensors"}  # no bank, and nothing half-written

    def test_for_people(self, fitted: Place, said: dict[str, Any]) -> None:
        result = fitted.m3(*FIT, "--force")
        assert result.code == 0
        assert "Training the codec" in result.err
        assert f"fingerprint: {said['fingerprint']}\n" in result.out
        assert "kind: product\n" in result.out
        assert "keys: 4x8" in result.out
        assert "smaller than bfloat16: " in result.out
        assert result.out == fitted.m3("codec", "report", "own.safetensors").out

    def test_a_bank_can_have_it_from_its_first_reference_on(self, fitted: Place, said: dict[str, Any]) -> None:
        fitted.configure(codec={"file": "own.safetensors"})
        assert fitted.m3("write", "facts").code == 0
        assert fitted.m3("inspect", "--json").json["codec"]["fingerprint"] == said["fingerprint"]

    def test_whole_documents_and_several_corpora(self, fitted: Place) -> None:
        fitted.text("two.txt", "# One\n\nA paragraph of words in a section.\n\n# Two\n\nAnother one of many words.\n")
        fitted.text("a.jsonl", '{"body": "The body of a record."}\n')
        more = ("--corpus", "two.txt", "--corpus", "a.jsonl", "--text-field", "body", "--json")
        split = fitted.m3("codec", "fit", *more, "--out", "split").json
        whole = fitted.m3("codec", "fit", *more, "--out", "whole", "--whole").json
        assert split["fingerprint"] != whole["fingerprint"]

    def test_a_corpus_larger_than_the_sample(self, fitted: Place) -> None:
        lines = records(f"Keeper {number} lit it on day {number * 37 % 1000}." for number in range(150))
        fitted.text("long.jsonl", lines)
        command = ("codec", "fit", "--corpus", "long.jsonl", "--json", "--out")
        some, more = (
            fitted.m3(*command, tokens, "--set", f"codec.sample_tokens={tokens}").json for tokens in ("500", "1000")
        )
        again = fitted.m3(*command, "again", "--set", "codec.sample_tokens=500").json
        assert some["fingerprint"] == again["fingerprint"] != more["fingerprint"]

    def test_into_the_configured_file(self, fitted: Place, said: dict[str, Any]) -> None:
        fitted.configure(codec={"file": "codecs/new"})
        arguments = ("codec", "fit", "--corpus", "facts", "--json")
        assert "does not exist; make it first" in fitted.m3(*arguments).complaint
        (fitted.folder / "codecs").mkdir()
        assert fitted.m3(*arguments).json["fingerprint"] == said["fingerprint"]
        assert load_any(fitted.folder / "codecs/new").fingerprint == said["fingerprint"]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--out", "a"], "say what to learn from: --corpus PATH"),
            (["--corpus", "facts"], "say what file to make: --out FILE, or set `codec.file`"),
            (["--corpus", "nothing", "--out", "a"], "nothing is neither a file nor a folder"),
            (["--corpus", "facts", "--out", "facts"], "facts: is a folder; name a file"),
            (["--corpus", "facts", "--out", "no/a"], "no/a: the folder no does not exist; make it first"),
            (["--corpus", "facts", "--out", "own.safetensors"], "own.safetensors: exists already; --force replaces"),
            (["--corpus", "empty.txt", "--out", "a"], "there is no text in empty.txt"),
            (["--corpus", "facts", "--out", "a", "--set", "codec.keys=x"], "codec."),
        ],
    )
    def test_mistakes(self, fitted: Place, arguments: list[str], expected: str) -> None:
        fitted.text("empty.txt", "\n")
        before = names(fitted)
        assert expected in fitted.m3("codec", "fit", *arguments).complaint
        assert names(fitted) == before

    @pytest.mark.parametrize("kind", ["raw", "scalar"])
    def test_codecs_that_learn_nothing(self, place: Place, kind: str) -> None:
        place.facts()
        set_codec(place, kind=kind)
        assert f"a codec of kind {kind} learns nothing" in place.m3(*FIT).complaint
        assert names(place) == {"facts", "m3.yaml"}


class TestConfiguredFile:
    def test_a_new_bank_gets_it(self, fitted: Place, said: dict[str, Any]) -> None:
        # Of another corpus than the bank's, and named relative to the configuration's folder.
        fitted.configure(codec={"file": "own.safetensors"})
        fitted.text("other.txt", "A glacier creaks above Tannhollow.\n\nThe miller counts sacks on Fridays.")
        result = fitted.m3("write", "other.txt")
        assert result.code == 0, result.err
        assert "Training the codec" not in result.err
        assert fitted.m3("inspect", "--json").json["codec"]["fingerprint"] == said["fingerprint"]
        assert (fitted.bank / "codec.safetensors").read_bytes() == (fitted.folder / "own.safetensors").read_bytes()
        # More goes into the same bank, with the file and without.
        assert fitted.m3("write", "facts", "--json").json["written"] == 6
        fitted.configure(codec={"file": None})
        fitted.text("more.txt", "Seven keepers rowed out with lanterns.")
        assert fitted.m3("write", "more.txt", "--json").json["written"] == 1
        assert fitted.m3("search", "the harbour lamp", "--json").code == 0
        assert fitted.m3("config", "--json").json["config"]["codec"]["file"] is None

    def test_alone_its_own_options_hold(self, fitted: Place, said: dict[str, Any]) -> None:
        set_codec(fitted, file="own.safetensors")
        for _ in range(2):  # a new bank, and again into it
            result = fitted.m3("write", "facts")
            assert result.code == 0, result.err
        assert fitted.m3("inspect", "--json").json["codec"]["fingerprint"] == said["fingerprint"]

    def test_paths_are_those_of_who_says_them(self, fitted: Place) -> None:
        fitted.configure(codec={"file": "own.safetensors"})
        (fitted.folder / "below").mkdir()
        path = str(fitted.folder / "own.safetensors")
        shown = Place(fitted.folder / "below").m3("config", "-c", "../m3.yaml", "--json").json
        assert Path(shown["config"]["codec"]["file"]).resolve() == Path(path).resolve()
        shown = fitted.m3("config", "--set", "codec.file=facts/2024", "--json").json
        assert shown["config"]["codec"]["file"] == str(fitted.folder / "facts/2024")
        assert shown["origins"]["codec.file"] == "--set"

    @pytest.mark.parametrize(
        ("codec", "expected"),
        [
            ({"file": "none"}, "none: cannot be read: No such file or directory; make one with `m3 codec fit`"),
            ({"file": "facts"}, "facts: cannot be read: Is a directory"),
            ({"file": "m3.yaml"}, "m3.yaml: damaged, or not the file of a codec"),
            ({"file": "flipped"}, "flipped: damaged"),
            ({"kind": "raw"}, "own.safetensors: holds a codec of kind 'product', not 'raw'"),
            ({"keys": "2x8"}, "own.safetensors: its options are not those of `codec`: keys 4x8 against 2x8"),
        ],
    )
    def test_another_file_is_refused(self, fitted: Place, codec: dict[str, Any], expected: str) -> None:
        damaged = bytearray((fitted.folder / "own.safetensors").read_bytes())
        damaged[-5] ^= 4
        fitted.text("flipped", bytes(damaged))
        options = {"kind": "raw"} if codec.get("kind") == "raw" else {**RESIDUAL, **codec}
        set_codec(fitted, **{"file": "own.safetensors", **options})
        complaint = fitted.m3("write", "facts").complaint
        assert complaint.startswith("m3: codec.file: ")
        assert expected in complaint
        assert not fitted.bank.exists()

    def test_another_spec_is_refused(self, fitted: Place) -> None:
        fitted.configure(codec={"file": "own.safetensors"}, memory={"reference_tokens": 64})
        complaint = fitted.m3("write", "facts").complaint
        assert "own.safetensors: the codec is of another spec: tokens 128 against 64" in complaint
        assert not fitted.bank.exists()

    def test_another_codec_than_the_banks_is_refused(self, fitted: Place) -> None:
        fitted.text("other.txt", "A glacier creaks above Tannhollow.\n\nThe miller counts sacks on Fridays.")
        assert fitted.m3("write", "other.txt").code == 0
        before = fitted.contents()
        fitted.configure(codec={"file": "own.safetensors"})
        complaint = fitted.m3("write", "facts").complaint
        assert "is not that of " in complaint
        assert "own.safetensors" in complaint
        assert fitted.contents() == before
        # What only reads needs no file: the bank has its codec.
        assert fitted.m3("search", "the harbour lamp", "--json").code == 0


class TestReport:
    def test_of_a_file(self, fitted: Place, said: dict[str, Any]) -> None:
        (fitted.folder / "m3.yaml").unlink()  # nothing of it is needed
        assert fitted.m3("codec", "report", "own.safetensors", "--json").json == said

    def test_of_the_bank_without_a_model(self, fitted: Place, said: dict[str, Any]) -> None:
        assert "there is no bank at" in fitted.m3("codec", "report").complaint
        fitted.configure(codec={"file": "own.safetensors"})
        assert fitted.m3("write", "facts").code == 0
        fitted.configure(model={"path": "./none"}, embedder={"path": "./none"})
        path = str(fitted.bank / "codec.safetensors")
        assert fitted.m3("codec", "report", "--json").json == {**said, "file": path}

    def test_of_one_that_learns_nothing(self, written: Place) -> None:
        facts = written.m3("codec", "report", "--json").json
        assert (facts["kind"], facts["key_error"], facts["value_error"]) == ("scalar", None, None)
        assert "relative squared error of keys: not measured" in written.m3("codec", "report").out

    def test_the_spec_in_short(self, place: Place) -> None:
        RawCodec(SPEC).save(place.folder / "raw")
        out = place.m3("codec", "report", "raw").out
        assert "spec: layers 0, 2, 3; 2 heads of 16; all 12 tokens of a reference; computed in float32\n" in out
        assert "smaller than bfloat16: 0.50 times\n" in out

    @pytest.mark.parametrize(
        ("file", "expected"),
        [
            ("none", "none: cannot be read: No such file or directory"),
            ("facts", "facts: cannot be read: Is a directory"),
            ("m3.yaml", "m3.yaml: damaged, or not the file of a codec"),
        ],
    )
    def test_mistakes(self, fitted: Place, file: str, expected: str) -> None:
        assert expected in fitted.m3("codec", "report", file).complaint

    def test_a_flipped_bit_anywhere(self, tmp_path: Path) -> None:
        path = tmp_path / "raw"
        RawCodec(SPEC).save(path)
        good = path.read_bytes()
        assert load_any(path).fingerprint == RawCodec(SPEC).fingerprint
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            with pytest.raises(CodecError, match="raw: "):
                load_any(path)

    def test_a_kind_that_nobody_knows_imports_nothing(self, tmp_path: Path) -> None:
        class Odd(RawCodec):
            kind = "antigravity:Codec"

        Odd(SPEC).save(tmp_path / "odd")
        with pytest.raises(PluginError, match="odd: its codec is of kind antigravity:Codec, which no plug-in has"):
            load_any(tmp_path / "odd")


class TestExchange:
    def test_there_and_back(self, fitted: Place, said: dict[str, Any]) -> None:
        result = fitted.m3(*EXPORT)
        assert result.code == 0
        assert [line.partition(":")[0] for line in result.out.splitlines()] == ["keys.faiss", "values.faiss"]
        assert faiss.read_index(str(fitted.folder / "keys.faiss")).sa_code_size() == 4
        assert faiss.read_index(str(fitted.folder / "values.faiss")).sa_code_size() == 2
        facts = fitted.m3(*IMPORT, "--json").json
        unmeasured = {"key_error": None, "value_error": None, "file": "made.safetensors"}
        assert {**facts, "file_bytes": 0} == {**said, **unmeasured, "file_bytes": 0}
        assert fitted.m3(*EXPORT, "--force", "--json").json == {
            "file": "own.safetensors",
            "keys": "keys.faiss",
            "values": "values.faiss",
            "fingerprint": said["fingerprint"],
        }

    def test_with_the_spec_of_the_bank(self, fitted: Place, said: dict[str, Any]) -> None:
        assert fitted.m3(*EXPORT).code == 0
        assert "there is no bank at" in fitted.m3(*IMPORT, "--bank").complaint
        assert fitted.m3("write", "facts").code == 0
        fitted.configure(model={"path": "./none"})
        assert fitted.m3(*IMPORT, "--bank", "--json").json["fingerprint"] == said["fingerprint"]

    def test_files_are_replaced_only_by_force(self, fitted: Place) -> None:
        fitted.text("values.faiss", "mine")
        assert "values.faiss: exists already; --force replaces it" in fitted.m3(*EXPORT).complaint
        assert "keys.faiss" not in names(fitted)
        assert (fitted.folder / "values.faiss").read_text() == "mine"
        assert fitted.m3(*EXPORT, "--force").code == 0
        fitted.text("made.safetensors", "mine")
        assert "made.safetensors: exists already" in fitted.m3(*IMPORT).complaint
        assert fitted.m3(*IMPORT, "--force").code == 0

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["own.safetensors", "--keys", "a", "--values", "./a"], "a: cannot be both --keys and what is made"),
            (["own.safetensors", "--keys", "own.safetensors", "--values", "a"], "cannot be both the codec and"),
            (["own.safetensors", "--keys", "a", "--values", "no/a"], "no/a: the folder no does not exist"),
            (["none", "--keys", "a", "--values", "b"], "none: cannot be read"),
            (["raw", "--keys", "a", "--values", "b"], "raw: a codec of kind raw; faiss has indexes for"),
            (["heads", "--keys", "a", "--values", "b"], "heads: faiss has indexes for codecs of scope model"),
        ],
    )
    def test_what_cannot_be_exported(self, fitted: Place, arguments: list[str], expected: str) -> None:
        RawCodec(SPEC).save(fitted.folder / "raw")
        set_codec(fitted, kind="product", key_bytes=2, value_bytes=2)
        if "heads" in arguments:
            assert fitted.m3("codec", "fit", "--corpus", "facts", "--out", "heads").code == 0
        before = names(fitted)
        assert expected in fitted.m3("codec", "export", *arguments, "--force").complaint
        assert names(fitted) == before

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ("none", "none: there is no such file"),
            ("m3.yaml", "m3.yaml: not an index of faiss"),
            ("flat", "flat: a IndexFlat"),
            ("wide", "wide: its vectors have 60 channels, not"),
            ("made.safetensors", "made.safetensors: cannot be both --keys and what is made"),
        ],
    )
    def test_what_cannot_be_imported(self, fitted: Place, said: dict[str, Any], keys: str, expected: str) -> None:
        assert fitted.m3(*EXPORT).code == 0
        faiss.write_index(faiss.IndexFlatL2(said["spec"]["head_dim"]), str(fitted.folder / "flat"))
        faiss.write_index(faiss.IndexFlatL2(60), str(fitted.folder / "wide"))
        before = names(fitted)
        arguments = ("--keys", keys, "--values", "values.faiss", "--out", "made.safetensors")
        assert expected in fitted.m3("codec", "import", *arguments).complaint
        assert names(fitted) == before
