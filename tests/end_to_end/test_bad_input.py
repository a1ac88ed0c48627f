"""Mistakes of the user: each is one line that says what to do and exit code 2, and costs nothing that is there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from tests.end_to_end.commands import M3, Contents, Place, environment, records
from tests.end_to_end.conftest import POSITIONS, NewPlace
from tests.model.families import make_model, make_tokenizer

TEXT = "Seven keepers rowed out with lanterns and came home with a bell.\n"
"""Of no corpus here: what writing would add."""


def complaint(place: Place, *arguments: object, **variables: str) -> str:
    """What a command complains of. Whatever there was before, bank and all, is there after it."""
    before = everything(place)
    line = place.m3(*arguments, **variables).complaint
    assert everything(place) == before
    return line


def everything(place: Place) -> tuple[set[Path], Contents | None]:
    """Every file in a place, and what its bank holds, if there is one."""
    files = {path for path in place.folder.rglob("*") if path.name not in ("lock.mdb", "data.mdb")}
    home = place.bank / "home"
    if not home.exists():
        return files, None
    # Looked at in a copy, with a configuration that is right for it.
    copy = Place(place.folder.with_name("copy"))
    shutil.copytree(place.bank, copy.bank)
    copy.configure(bank="./bank", model={"path": "none"}, embedder={"path": "none"}, tiers=[{"kind": "lmdb"}])
    try:
        return files, copy.contents()
    finally:
        shutil.rmtree(copy.folder)


class TestConfiguration:
    COMMANDS = (
        ["write", "facts"],
        ["ask", "Why?"],
        ["chat"],
        ["search", "why"],
        ["inspect"],
        ["forget", "1"],
        ["codec", "report"],
        ["config"],
    )

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
    def test_missing_file(self, place: Place, command: list[str]) -> None:
        line = complaint(place, *command, "--config", "m4.yaml")
        assert line == "m3: no such configuration file: m4.yaml"

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
    def test_unknown_key(self, written: Place, command: list[str]) -> None:
        written.configure(recall={"memorys": 3})
        line = written.m3(*command).complaint
        assert line == "m3: m3.yaml: recall.memorys is not known; did you mean recall.memories?"

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ("recall.memories=many", "--set: recall.memories must be"),
            ("recall.deadline=soon", "--set: recall.deadline must be a time"),
            ("recall.when_late=never", "--set: recall.when_late"),
            ("memory.layers=[3, 1]", "--set: memory.layers must be all, first-half, middle-half, a range"),
            ("tiers.7.kind=gpu", "--set: tiers.7.kind is not known; the list has 2 items"),
            ("bank", "--set bank: write it as KEY=VALUE"),
            ("=3", "--set"),
            ("recall={", "--set"),
        ],
    )
    def test_wrong_value(self, place: Place, setting: str, expected: str) -> None:
        assert complaint(place, "config", "--set", setting).startswith(f"m3: {expected}")

    def test_wrong_variable(self, place: Place) -> None:
        assert complaint(place, "config", M3_RECALL__K="3").startswith("m3: M3_RECALL__K: recall.k is not known")

    def test_syntax(self, place: Place) -> None:
        place.file.write_text("bank: ./bank\nmodel: {path: x\n")
        assert complaint(place, "config").startswith("m3: m3.yaml: line 3: ")

    def test_missing_key(self, place: Place) -> None:
        place.configure(embedder=None)
        assert complaint(place, "search", "why") == "m3: m3.yaml: embedder.path is missing"

    def test_unknown_plug_ins(self, place: Place) -> None:
        place.facts()
        for setting, expected in {
            "model.adapter=transformer": "adapter transformer is not known; did you mean transformers?",
            "embedder.kind=flag-embeddings": "embedder flag-embeddings is not known; did you mean flag-embedding?",
            "codec.kind=produkt": "codec produkt is not known; did you mean product?",
            "index.kind=usearsh": "index usearsh is not known; did you mean usearch?",
            "tiers.0.kind=pined": "tier pined is not known; did you mean pinned?",
            "embedder.kind=no.such.module:Name": "no.such.module:Name: no module no; is its folder on PYTHONPATH?",
            "embedder.kind=tests.end_to_end.embedders:Nobody": "module tests.end_to_end.embedders has no Nobody",
        }.items():
            assert expected in complaint(place, "write", "facts", "--set", setting)

    def test_options_of_plug_ins(self, place: Place) -> None:
        place.facts()
        for settings, expected in {
            (
                "codec.kind=product",
                "codec.key_bytes=5",
            ): "codec.key_bytes must divide head_dim 16: one of 1, 2, 4, 8, 16",
            ("codec.bits=5",): "codec.bits of the scalar codec must be 4 or 8, not 5",
            ("codec.bit=4",): "codec.bit is not known; did you mean codec.bits?",
            ("index.dtype=f12",): "index dtype must be one of",
            ("index.connect=3",): "index.connect is not known; did you mean index.connectivity?",
            ("embedder.dims=3",): "embedder.dims is not known; did you mean embedder.dim?",
            ("tiers.1.maxsize=1GiB",): "tiers.1.maxsize is not known; did you mean tiers.1.max_size?",
            ("tiers.1.max_size=much",): "tiers.1.max_size must be a size such as 512MiB",
            ("tiers.0.kind=lmdb",): "tiers: lmdb is a home and must come last",
            ("memory.layers=[1, 9]",): "memory.layers: the model has layers 0 to 3",
            ("model.device=cuda:77",): "model.device: no device 'cuda:77' on this machine",
        }.items():
            line = complaint(place, "write", "facts", *(part for one in settings for part in ("--set", one)))
            assert expected in line

    def test_no_model_there(self, written: Place) -> None:
        Path(written.folder, "not-a-model").mkdir()
        for path, expected in {
            "./nowhere": "no such folder",
            "./model.gguf": "no such file",
            "./not-a-model": "cannot load",
            "nobody/nothing-at-all": "cannot load",  # a hub name, and there is no hub
        }.items():
            for command in (["write", "facts"], ["ask", "Why?"]):
                line = complaint(written, *command, "--set", f"model.path={path}")
                assert "model.path: " in line
                assert expected in line
                assert path.removeprefix("./") in line

    def test_a_gguf_file_that_is_none(self, place: Place) -> None:
        place.facts()
        place.text("model.gguf", "not a model")
        assert "model.gguf" in complaint(place, "write", "facts", "--set", "model.path=./model.gguf")

    def test_no_embedder_there(self, place: Place) -> None:
        place.facts()
        for kind in ("sentence-transformers", "flag-embedding"):
            for path in ("./nowhere", "nobody/nothing-at-all"):
                place.configure(embedder={"kind": kind, "path": path})
                assert path.removeprefix("./") in complaint(place, "write", "facts")


class TestBank:
    @pytest.mark.parametrize("command", [["ask", "Why?"], ["chat"], ["search", "why"], ["inspect"], ["forget", "1"]])
    def test_none_yet(self, place: Place, command: list[str]) -> None:
        line = complaint(place, *command)
        assert line == f"m3: there is no bank at {place.bank}; make one with `m3 write`"

    def test_of_another_model(self, written: Place, tmp_path: Path) -> None:
        other = tmp_path / "other-model"
        make_model("llama", seed=1).save_pretrained(other)
        make_tokenizer().save_pretrained(other)
        written.configure(model={"path": str(other)})
        self.refused(written, "was written by another model", str(other), "set `bank` to another folder")

    def test_of_another_tokenizer(self, written: Place, tmp_path: Path, model_path: Path) -> None:
        other = tmp_path / "other-tokenizer"
        shutil.copytree(model_path, other)
        settings = json.loads((other / "tokenizer.json").read_text())
        settings["normalizer"] = {"type": "Lowercase"}
        (other / "tokenizer.json").write_text(json.dumps(settings))
        written.configure(model={"path": str(other)})
        self.refused(written, "was written with another tokenizer", "set `bank` to another folder")

    @pytest.mark.parametrize(
        ("setting", "difference"),
        [
            ({"layers": "first-half"}, "layers [0, 1, 2, 3] against [0, 1]"),
            ({"reference_tokens": 64}, "tokens 128 against 64"),
            ({"sink": "Note:"}, "the sink 'Reference:', not 'Note:'"),
        ],
    )
    def test_of_another_spec(self, written: Place, setting: dict[str, Any], difference: str) -> None:
        written.configure(memory=setting)
        self.refused(written, difference, "set `bank` to another folder")

    def test_of_another_embedder(self, written: Place) -> None:
        written.configure(embedder={"salt": "another"})
        self.refused(written, "was written with another embedder (hashed)", "set `bank` to another folder")
        assert "another embedder" in complaint(written, "search", "why")

    def test_of_another_codec(self, written: Place) -> None:
        written.configure(codec={"kind": "raw", "dtype": "float32"})
        before = written.contents()
        line = complaint(written, "write", "facts")
        assert "was written with another codec" in line
        assert "`m3 codec refit`" in line
        assert written.contents() == before

    @pytest.mark.parametrize(("format", "mend"), [(6, "install a newer m3runtime"), (0, "write the bank anew")])
    def test_of_another_format_version(self, written: Place, format: int, mend: str) -> None:
        right = written.contents()
        set_manifest(written, lambda manifest: {**manifest, "format": format, "added": [1]})
        for command in (["write", "more.txt"], ["ask", "Why?"], ["search", "why"], ["inspect"], ["forget", "1"]):
            written.text("more.txt", TEXT)
            line = written.m3(*command).complaint
            assert f"{written.bank}: bank of format {format}, this release reads 1 to 5; {mend}" in line
        set_manifest(written, lambda _: json.loads(right.manifest))
        assert written.contents() == right

    def test_whose_manifest_is_nonsense(self, written: Place) -> None:
        for value in (b"\xff", b"[]", b"{}", b'{"format": "two"}', b'{"format": 1}'):
            set_manifest(written, lambda _, value=value: value)  # type: ignore[misc]
            assert "the manifest cannot be read" in written.m3("search", "why").complaint

    def test_that_is_another_programs_or_damaged(self, place: Place) -> None:
        place.facts()
        (place.bank / "home").mkdir(parents=True)
        for content in (b"not a database" * 999, b"\0" * 4096):
            (place.bank / "home/data.mdb").write_bytes(content)
            for command in (["write", "facts"], ["search", "why"]):
                assert str(place.bank) in place.m3(*command).complaint
                assert (place.bank / "home/data.mdb").read_bytes() == content

    def test_where_somebodys_home_folder_is(self, place: Place) -> None:
        place.facts()
        thesis = place.bank / "home/me/thesis.txt"
        thesis.parent.mkdir(parents=True)
        thesis.write_text("The only copy.")
        line = place.m3("write", "facts").complaint
        assert f"{place.bank / 'home'} is not the home of a bank; set `bank` to another folder" in line
        assert thesis.read_text() == "The only copy."
        assert [path.name for path in place.bank.iterdir()] == ["home"]

    def test_where_a_file_is(self, place: Place) -> None:
        place.facts()
        place.text("bank", "I am a file.")
        for command in (["write", "facts"], ["search", "why"]):
            assert str(place.bank) in complaint(place, *command)

    def test_whose_codec_is_lost(self, written: Place) -> None:
        codec = written.bank / "codec.safetensors"
        content = codec.read_bytes()
        for damaged in (None, content[:-1], b""):
            codec.unlink(missing_ok=True)
            if damaged is not None:
                codec.write_bytes(damaged)
            line = written.m3("ask", "Why?").complaint
            assert str(codec) in line
            assert "restore the file, or write the bank anew" in line
        codec.write_bytes(content)
        assert written.m3("ask", "Why?").code == 0

    def refused(self, place: Place, *parts: str) -> None:
        place.text("more.txt", TEXT)
        for command in (["write", "more.txt"], ["ask", "Why?"], ["chat"]):
            before = bank_bytes(place)
            line = place.m3(*command).complaint
            assert bank_bytes(place) == before
            assert str(place.bank) in line
            for part in parts:
                assert part in line


class TestCorpus:
    @pytest.fixture(params=["new", "written"])
    def target(self, request: pytest.FixtureRequest) -> Place:
        """A place without a bank, and one with."""
        place: Place = request.getfixturevalue("place" if request.param == "new" else "written")
        return place

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("empty.txt", "", "there is no text in empty.txt"),
            ("blank.txt", " \n\t\n", "there is no text in blank.txt"),
            ("blank.html", "<p> </p><script>no text</script>", "there is no text in blank.html"),
            ("blank.jsonl", "\n\n", "there is no text in blank.jsonl"),
            ("binary.txt", b"\x7fELF\x00\x01", "binary.txt is a binary file, not text"),
            ("binary.dat", bytes(range(128, 256)), "binary.dat is a binary file, or text in an unknown encoding"),
            ("half.txt", "Zwölf".encode("utf-16")[:-1], "half.txt is a binary file, or damaged text: byte 10"),
            ("bad2.jsonl", '{"body": "It is none."}', "bad2.jsonl, line 1 is not an object with a text in 'text'"),
        ],
    )
    def test_a_file(self, target: Place, name: str, content: str | bytes, expected: str) -> None:
        target.text(name, content)
        assert expected in complaint(target, "write", name)

    def test_no_such_file(self, target: Place) -> None:
        target.text("good.txt", TEXT)
        line = complaint(target, "write", "good.txt", "lost.txt")
        assert line == "m3: lost.txt is neither a file nor a folder"

    def test_an_empty_folder(self, target: Place) -> None:
        target.text("good.txt", TEXT)
        (target.folder / "nothing").mkdir()
        assert "nothing holds no text" in complaint(target, "write", "good.txt", "nothing")

    def test_a_whole_document_that_is_too_long(self, target: Place) -> None:
        target.text("good.txt", TEXT)
        target.text("long.txt", "The lamp burns oil. " * 50)
        line = complaint(target, "write", "good.txt", "long.txt", "--whole")
        assert line.startswith("m3: long.txt: ")
        assert "tokens, but a reference has at most 128; shorten it, or write without --whole" in line

    def test_a_text_without_spaces_is_more_than_a_word(self, place: Place) -> None:
        place.text("tokyo.txt", "東京は日本の首都です。")
        assert place.m3("write", "tokyo.txt", "--json").json["written"] == 1


class TestArguments:
    def test_unknown_ids(self, written: Place) -> None:
        assert complaint(written, "inspect", 6) == "m3: the bank has no memory 6"
        assert complaint(written, "forget", 2, 6, 77) == "m3: the bank has no memory 6, 77; nothing was forgotten"

    @pytest.mark.parametrize("id", [2**63, 2**64 - 1, 2**64, 10**30])
    def test_ids_that_none_has(self, written: Place, id: int) -> None:
        for command in ("inspect", "forget"):
            assert f"no memory {id}" in complaint(written, command, id)

    def test_unknown_source(self, written: Place) -> None:
        line = complaint(written, "forget", "--source", "facts/lamp.txt", "--source", "lamp.txt")
        assert line == "m3: the bank remembers nothing from lamp.txt; `m3 inspect --all` lists its sources"

    def test_nothing_to_do(self, written: Place) -> None:
        ways = "name ids, files, --source, --quarantined or --expired"
        assert complaint(written, "forget") == f"m3: nothing to forget is given: {ways}"
        assert complaint(written, "search", " ") == "m3: there is nothing to search for: the text is blank"
        assert "token" in complaint(written, "ask", "", "--set", "generate.prompt=plain")

    def test_no_chat_template(self, written: Place, tmp_path: Path, model_path: Path) -> None:
        other = tmp_path / "no-template"
        shutil.copytree(model_path, other)
        (other / "chat_template.jinja").unlink()
        written.configure(model={"path": str(other)})
        line = complaint(written, "ask", "Why?", "--set", "generate.prompt=chat")
        assert line == "m3: generate.prompt: this model has no chat template; use question or plain"

    def test_no_chat_template_for_a_chat(self, written: Place, tmp_path: Path, model_path: Path) -> None:
        other = tmp_path / "no-template"
        shutil.copytree(model_path, other)
        (other / "chat_template.jinja").unlink()
        written.configure(model={"path": str(other)})
        line = written.m3("chat", stdin="Why?\n").complaint
        assert "no chat template, so it cannot chat; ask single questions with `m3 ask`" in line
        (other / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
        line = written.m3("chat", stdin="Why?\n").complaint
        assert line == "m3: model.path: the model's chat template refuses this conversation: roles must alternate"

    def test_text_that_is_not_utf_8(self, written: Place) -> None:
        arguments = [os.fsencode(M3), b"search", b"wh\xff"]
        result = subprocess.run(arguments, cwd=written.folder, env=environment(), capture_output=True)
        assert (result.returncode, result.stdout) == (2, b"")
        assert result.stderr.endswith(b" is not text in UTF-8\n")
        assert result.stderr.count(b"\n") == 1
        assert complaint(written, "ask", os.fsdecode(b"wh\xff")).endswith(" is not text in UTF-8")
        assert written.m3("chat", stdin=b"wh\xff\n").complaint == "m3: the line is not text in UTF-8"

    def test_a_prompt_beyond_the_model_s_positions(self, written: Place) -> None:
        line = complaint(written, "ask", "lamp " * (POSITIONS + 88))
        assert f"tokens, and of the model's {POSITIONS} positions " in line
        assert line.endswith("are left for a prompt; shorten it")

    def test_a_name_that_is_no_folder_here(self, written: Place) -> None:
        written.configure(model={"path": "models/absent"})
        line = complaint(written, "ask", "Why?")
        assert "models/absent: no such folder in " in line
        assert "the hub cannot be reached; write ./NAME for a folder here, or let `m3 init` find models" in line

    @pytest.mark.parametrize(
        "arguments", [["ask"], ["search", "why", "-k", "0"], ["forget", "-1"], ["forge"], ["ask", "a", "b"]]
    )
    def test_usage(self, place: Place, arguments: list[str]) -> None:
        result = place.m3(*arguments)
        assert (result.code, result.out) == (2, "")
        assert "Usage: m3" in result.err


class TestFull:
    LIMIT = "4MiB"

    def test_it_grows_up_to_the_limit_and_says_so(self, new_place: NewPlace, tmp_path: Path) -> None:
        corpus = records(f"Keeper {number} of the lamp lit it for {number} nights in a row." for number in range(320))
        undisturbed, place = (new_place(tmp_path / name) for name in ("undisturbed", "full"))
        for one in (undisturbed, place):
            one.configure(codec={"kind": "raw"}, tiers=[{"kind": "pinned", "capacity": "4MiB"}, {"kind": "lmdb"}])
            one.text("corpus.jsonl", corpus)
        assert undisturbed.m3("write", "corpus.jsonl", "--json").json["written"] == 320
        place.configure(tiers=[{"kind": "pinned", "capacity": "4MiB"}, {"kind": "lmdb", "max_size": self.LIMIT}])
        line = place.m3("write", "corpus.jsonl", "--json").complaint
        assert f"{place.bank}" in line
        assert "is full: its limit of 4MiB is reached; raise `max_size` of the lmdb tier" in line
        # What was committed is readable, and stays so when it is tried again.
        committed = place.contents()
        assert 0 < len(committed.blocks) < 320
        assert len(committed.blocks) % 64 == 0
        assert (place.bank / "home/data.mdb").stat().st_size <= 4 << 20
        assert "max_size" in place.m3("write", "corpus.jsonl", "--json").complaint
        assert place.contents() == committed
        assert len(place.m3("search", "keeper of the lamp", "--json").json) == 5
        assert place.m3("ask", "Who lit the lamp?", "--json").json["memories"]
        # With a higher limit it goes on.
        place.configure(tiers=[{"kind": "lmdb", "max_size": "1GiB"}])
        report = place.m3("write", "corpus.jsonl", "--json").json
        assert (report["written"], report["known"]) == (320 - len(committed.blocks), len(committed.blocks))
        assert place.contents() == undisturbed.contents()

    def test_the_bar_does_not_hide_it(self, place: Place) -> None:
        place.facts()
        result = place.m3("write", "facts", "--set", "tiers.1.max_size=64KiB")
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith("m3: ")
        assert "its limit of 64KiB is reached" in result.err.splitlines()[-1]

    def test_a_limit_too_low_for_any_bank(self, place: Place) -> None:
        place.facts()
        assert "max_size" in place.m3("write", "facts", "--json", "--set", "tiers.1.max_size=16KiB").complaint
        assert "there is no bank" in place.m3("search", "why").complaint
        assert place.m3("write", "facts", "--json").json["written"] == 6


class TestMissingExtras:
    """The extra that would install it is named."""

    # A process in which a module cannot be found, as if its package were not installed.
    HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""

    def test_of_a_model(self, place: Place) -> None:
        place.facts()
        place.text("hidden/sitecustomize.py", self.HIDE)
        line = place.process("write", "facts", "--json", first=str(place.folder / "hidden")).complaint
        self.check(line, "transformers", "transformers")
        assert not place.bank.exists()

    @pytest.mark.parametrize(
        ("hidden", "extra", "changes"),
        [
            ("faiss", "train", {"codec": {"kind": "product", "key_bytes": 4, "value_bytes": 4}}),
            ("sentence_transformers", "sentence-transformers", {"embedder": {"kind": "sentence-transformers"}}),
            ("FlagEmbedding", "bge", {"embedder": {"kind": "flag-embedding"}}),
        ],
    )
    def test_of_what_is_imported_when_it_is_used(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, hidden: str, extra: str, changes: dict[str, Any]
    ) -> None:
        place.facts()
        place.configure(**changes)
        if "embedder" in changes:
            shutil.copytree(Config.load(place.file, environ={}).model.path, place.folder / "embedder")
            place.file.write_text(place.file.read_text().replace("path: hashed", "path: ./embedder"))
        monkeypatch.setitem(sys.modules, hidden, None)  # what Python itself keeps for a failed import
        self.check(place.m3("write", "facts", "--json").complaint, hidden, extra)
        assert not place.bank.exists()

    def check(self, line: str, hidden: str, extra: str) -> None:
        assert f"needs {hidden}" in line
        assert f"pip install 'm3runtime[{extra}]'" in line


def set_manifest(place: Place, change: Callable[[Any], Any]) -> None:
    """Replace the manifest in the home by what ``change`` makes of it."""
    home = assembly.open_home(Config.load(place.file, environ={}))(path=place.bank / "home")
    with home:
        there = home.get_meta("manifest")
        assert there is not None
        try:
            value = change(json.loads(there))
        except ValueError:
            value = change(None)
        home.set_meta("manifest", value if isinstance(value, bytes) else json.dumps(value).encode())


def bank_bytes(place: Place) -> dict[str, bytes]:
    """The bank's files; LMDB's table of readers and the stamp of a whole file, which names an inode, are nobody's."""
    nobodys = ("lock.mdb", "verified")
    files = (path for path in place.bank.rglob("*") if path.is_file() and path.name not in nobodys)
    return {str(path): path.read_bytes() for path in files}
