"""The way of a corpus into a bank and out of it again, command by command."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from m3runtime import cli
from m3runtime.cli.terminal import printable
from m3runtime.testing.embedder import EmbedderContract, MakeEmbedder
from tests.end_to_end.commands import FACTS, Place, Result, of_line, records
from tests.end_to_end.conftest import NewPlace
from tests.end_to_end.embedders import HashedWords

QUESTIONS = {
    "facts/lamp.txt": "What does the harbour lamp of Uskerfold burn?",
    "facts/ferry.md": "When does the ferry to Brannoch sail?",
    "facts/bread.rst": "What do bakers sell at Michaelmas?",
    "facts/wall.html": "What did quarrymen build of granite?",
    "facts/birds.jsonl:owl": "Who guards the library?",
}
"""What to ask of each source."""


def search(place: Place, text: str, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = place.m3("search", text, "--json", *arguments).json
    return found


def ask(place: Place, text: str, *arguments: object) -> dict[str, Any]:
    answer: dict[str, Any] = place.m3("ask", text, "--json", *arguments).json
    return answer


def quiet(result: Result) -> Result:
    """A result that says nothing on standard error."""
    assert (result.code, result.err) == (0, "")
    return result


class TestHashedWords(EmbedderContract):
    @pytest.fixture(scope="class")
    @staticmethod
    def make_embedder() -> MakeEmbedder:
        return lambda: HashedWords("any")


class TestWrite:
    def test_a_folder_of_every_kind_of_file(self, place: Place) -> None:
        result = place.m3("write", place.facts())
        assert result.code == 0
        assert result.out.startswith("6 memories written, 0 known already; files: 5 new; ")
        assert str(place.bank) in result.out
        texts = set(place.contents().texts.values())
        assert "# Wall\n\nQuarrymen built the northern wall in 1431 from granite." in texts
        assert "An owl named Perpetua guards the library." in texts
        assert {FACTS[name].strip() for name in ("lamp.txt", "ferry.md", "bread.rst")} < texts

    def test_the_progress_goes_to_standard_error(self, place: Place) -> None:
        place.configure(codec={"kind": "product", "key_bytes": 2, "value_bytes": 2, "sample_tokens": 50})
        result = place.m3("write", place.facts())
        assert result.code == 0
        assert "Training the codec" in result.err
        assert of_line(result.err, r"Writing memories: 6 of 6, (\S+)").endswith("/s")
        assert len(result.out.splitlines()) == 1

    def test_json(self, place: Place) -> None:
        place.text("facts/picture.png", b"\x89PNG")
        report = quiet(place.m3("write", place.facts(), "--json")).json
        assert report.pop("seconds") > 0
        phases = report.pop("phases")
        assert list(phases) == ["split", "codec", "model", "encode", "embed", "commit", "index"]
        assert all(seconds > 0 for seconds in phases.values())
        assert report == {
            "documents": 6,
            "references": 6,
            "written": 6,
            "known": 0,
            "catalogued": 0,
            "forgotten": 0,
            "sources": {
                "new": sorted(f"facts/{name}" for name in FACTS),
                "changed": [],
                "renamed": {},
                "unchanged": [],
                "gone": [],
            },
            "bytes": sum(map(len, place.contents().blocks.values())),
            "bank": str(place.bank),
            "skipped": ["facts/picture.png"],
            "expired": 0,
            "expired_files": [],
            "left_out": {},
            "unread": {},
            "codec": None,
            "reencoded": 0,
            "left": 0,
        }

    def test_files_that_are_passed_over_are_counted(self, place: Place) -> None:
        place.text("facts/picture.png", b"\x89PNG")
        result = place.m3("write", place.facts())
        assert "1 files were passed over, such as facts/picture.png" in result.err

    def test_again_doubles_nothing(self, written: Place) -> None:
        before = written.contents()
        report = written.m3("write", "facts", "--json").json
        assert (report["written"], report["known"], report["bytes"]) == (0, 6, 0)
        assert written.contents() == before
        # Nor does the same text by another name, or twice in one corpus.
        shutil.copytree(written.folder / "facts", written.folder / "again/more")
        written.text("again/lamp.jsonl", records([FACTS["lamp.txt"]] * 2))
        report = written.m3("write", "again", "facts", "--json").json
        assert (report["documents"], report["references"], report["written"]) == (2, 1, 0)
        after = written.contents()
        assert (after.blocks, after.embeddings, after.texts) == (before.blocks, before.embeddings, before.texts)
        lamp = [(place.source, place.start) for place in after.references[4].places]
        assert sorted(lamp) == [
            ("again/lamp.jsonl", 0),
            ("again/lamp.jsonl", 0),
            ("again/more/lamp.txt", 0),
            ("facts/lamp.txt", 0),
        ]

    def test_a_second_corpus_extends(self, written: Place) -> None:
        before = written.contents()
        texts = ["A glacier creaks above Tannhollow.", "The miller counts sacks on Fridays."]
        written.text("more.jsonl", records(texts))
        assert written.m3("write", "more.jsonl", "--json").json["written"] == 2
        after = written.contents()
        assert before.blocks.items() < after.blocks.items()
        assert before.references.items() < after.references.items()
        assert [after.texts[id] for id in (6, 7)] == texts
        assert search(written, "a glacier above Tannhollow")[0]["id"] == 6
        assert 6 in [memory["id"] for memory in ask(written, "What creaks above Tannhollow?")["memories"]]

    def test_another_bank_of_the_same_corpus_is_equal(self, written_once: Place, place: Place) -> None:
        place.m3("write", place.facts())
        assert place.contents() == written_once.contents()

    def test_whole_documents(self, place: Place) -> None:
        place.text("two.txt", "\nOne paragraph.\n\nAnother one.\n")
        assert place.m3("write", "two.txt", "--whole", "--json").json["written"] == 1
        assert place.contents().texts == {0: "One paragraph.\n\nAnother one."}

    def test_another_field_of_json_lines(self, place: Place) -> None:
        place.text("a.jsonl", '{"body": "The body of a record.", "source": "first"}\n')
        place.m3("write", "a.jsonl", "--text-field", "body")
        assert place.m3("inspect", "--json").json["sources"] == {"a.jsonl": 1}

    def test_codecs(self, new_place: NewPlace, tmp_path: Path) -> None:
        for codec in (
            {"kind": "raw"},
            {"kind": "scalar", "key_bits": 4},
            {"kind": "product", "key_bytes": 4, "value_bytes": 2},
        ):
            place = new_place(tmp_path / str(codec["kind"]))
            place.configure(codec=None)
            place.configure(codec=codec)
            place.m3("write", place.facts())
            facts = place.m3("inspect", "--json").json
            stated = {"kind": "product", "keys": "4x8", "values": "2x8"} if codec["kind"] == "product" else codec
            found = facts["planned_codec"] if codec["kind"] == "product" else facts["codec"]
            assert found.items() >= stated.items()  # bytes are stated as the levels that they stand for
            assert len(ask(place, QUESTIONS["facts/lamp.txt"])["memories"]) > 0

    @pytest.mark.parametrize("codec", [{"kind": "raw"}, {"kind": "product", "key_bytes": 4, "value_bytes": 2}])
    def test_few_tokens_of_each_reference(self, new_place: NewPlace, tmp_path: Path, codec: dict[str, Any]) -> None:
        places = {"all": new_place(tmp_path / "all"), 4: new_place(tmp_path / "few")}
        sizes, question = {}, QUESTIONS["facts/lamp.txt"]
        for count, place in places.items():
            place.configure(codec=None)
            place.configure(codec=codec, memory={"tokens_per_head": count})
            report = place.m3("write", place.facts(), "--json").json
            blocks = place.contents().blocks
            assert report["bytes"] == sum(map(len, blocks.values()))
            sizes[count] = {len(block) for block in blocks.values()}
            assert place.m3("inspect", "--json").json["spec"]["tokens"] == (128 if count == "all" else count)
        assert len(sizes[4]) == 1
        assert max(sizes[4]) < min(sizes["all"]) / 2
        few, everything = (ask(place, question) for place in (places[4], places["all"]))
        assert [one | {"share": 0} for one in few["memories"]] == [one | {"share": 0} for one in everything["memories"]]
        assert few["answer"] != everything["answer"]
        # The bank says what it holds; and a variable is read as the number that it is.
        assert "tokens 4 against 5" in places[4].m3("ask", question, M3_MEMORY__TOKENS_PER_HEAD="5").complaint


class TestSearch:
    @pytest.mark.parametrize("source", QUESTIONS)
    def test_finds_what_is_asked_for(self, written_once: Place, source: str) -> None:
        found = search(written_once, QUESTIONS[source], "-k", 2)
        assert len(found) == 2
        assert found[0]["source"] == source
        assert found[0]["score"] > found[1]["score"]
        assert found[0]["text"] == written_once.contents().texts[found[0]["id"]]

    def test_plain(self, written_once: Place) -> None:
        result = quiet(written_once.m3("search", "ferry", "-k", 1))
        first, text = result.out.splitlines()
        assert first.split()[2] == "facts/ferry.md"
        assert text.strip().startswith("# The ferry The ferry to Brannoch sails")

    def test_any_score_and_no_more_than_there_are(self, written_once: Place) -> None:
        found = search(written_once, "entirely unrelated", "-k", 50, "--set", "recall.min_score=0.9")
        assert len(found) == 6

    def test_needs_no_model(self, written: Place) -> None:
        written.configure(model={"path": "./nowhere"})
        assert len(search(written, "ferry")) == 5


class TestAsk:
    @pytest.mark.parametrize("source", QUESTIONS)
    def test_reads_what_is_asked_for(self, written_once: Place, source: str) -> None:
        answer = ask(written_once, QUESTIONS[source])
        assert answer.keys() == {
            *("question", "answer", "stopped_by", "memories", "grounding", "found", "grounded"),
            *("first_token_s", "tokens_per_s"),
        }
        best = max(answer["memories"], key=lambda memory: memory["score"])
        assert best["source"] == source
        assert best.keys() == {"id", "score", "share", "source", "heading", "places", "text"}
        shares = {memory["id"]: memory["share"] for memory in answer["memories"]}
        assert sum(shares.values()) == pytest.approx(answer["grounding"]["share"], abs=1e-3)
        for span in answer["grounding"]["spans"]:
            assert 0 <= span["start"] < span["end"] <= len(answer["answer"])
            assert span["id"] in shares

    def test_plain(self, written_once: Place) -> None:
        question = QUESTIONS["facts/lamp.txt"]
        result = written_once.m3("ask", question)
        assert result.code == 0
        assert result.out.strip() == ask(written_once, question)["answer"]
        assert "memories read, first token after" in result.err
        assert "facts/lamp.txt" in result.err

    def test_an_answer_with_little_evidence_is_marked(self, written_once: Place) -> None:
        question = QUESTIONS["facts/lamp.txt"]
        assert ask(written_once, question)["grounded"] is None
        evidence = ask(written_once, question)["grounding"]["evidence"]
        assert 0 < evidence < 0.99
        for floor, grounded in ((evidence - 0.01, True), (evidence + 0.01, False)):
            settings = ("--set", f"generate.grounding_floor={floor}")
            assert ask(written_once, question, *settings)["grounded"] is grounded
            assert ("not grounded" in written_once.m3("ask", question, *settings).err) is not grounded
        unread = ask(written_once, question, "--set", "recall.min_score=1", "--set", "generate.grounding_floor=0.01")
        assert (unread["found"], unread["grounded"]) == (False, False)

    def test_twice_is_the_same(self, written_once: Place) -> None:
        one, two = (ask(written_once, "Where is the abbey?") for _ in range(2))
        assert (one["answer"], one["memories"]) == (two["answer"], two["memories"])

    def test_without_memory(self, written_once: Place, place: Place) -> None:
        question = QUESTIONS["facts/lamp.txt"]
        without = ask(written_once, question, "--no-memory")
        assert without["memories"] == []
        # The same without a bank at all; memories do change the answer.
        assert ask(place, question, "--no-memory")["answer"] == without["answer"]
        assert ask(written_once, question)["answer"] != without["answer"]

    def test_settings_and_variables_go_before_the_file(self, written_once: Place) -> None:
        question = QUESTIONS["facts/ferry.md"]
        assert len(ask(written_once, question, "--set", "recall.memories=1")["memories"]) == 1
        result = written_once.m3("ask", question, "--json", M3_RECALL__MEMORIES="2")
        assert len(result.json["memories"]) == 2
        assert ask(written_once, question, "--set", "recall.min_score=1")["memories"] == []

    def test_a_question_without_a_match_is_answered_all_the_same(self, written_once: Place) -> None:
        assert ask(written_once, "Xylophone?", "--set", "recall.min_score=0.9")["memories"] == []


class TestChat:
    TALK = f"{QUESTIONS['facts/lamp.txt']}\n\n{QUESTIONS['facts/ferry.md']}\n"

    def test_json_is_a_line_for_each_answer(self, written_once: Place) -> None:
        result = quiet(written_once.m3("chat", "--json", stdin=self.TALK))
        first, second = (json.loads(line) for line in result.out.splitlines())
        assert first["message"] == QUESTIONS["facts/lamp.txt"]
        assert first["memories"][0]["source"] == "facts/lamp.txt"
        assert second["memories"][0]["source"] == "facts/ferry.md"

    def test_plain(self, written_once: Place) -> None:
        result = written_once.m3("chat", stdin=self.TALK)
        assert result.code == 0
        assert result.err.count("memories read") == 2
        answers = [json.loads(line) for line in written_once.m3("chat", "--json", stdin=self.TALK).out.splitlines()]
        assert all(printable(answer["answer"]) in result.out for answer in answers)

    def test_what_was_said_counts(self, written_once: Place) -> None:
        alone = written_once.m3("chat", "--json", stdin=f"{QUESTIONS['facts/ferry.md']}\n").json
        after = written_once.m3("chat", "--json", stdin=self.TALK).out.splitlines()[1]
        assert json.loads(after)["answer"] != alone["answer"]

    def test_the_model_may_write_what_is_searched_by(self, written_once: Place) -> None:
        (first, plain), (same, written) = (
            [[one["score"] for one in json.loads(line)["memories"]] for line in answers.out.splitlines()]
            for answers in (
                written_once.m3("chat", "--json", *more, stdin=self.TALK)
                for more in ((), ("--set", "recall.condense=true"))
            )
        )
        assert first == same
        assert plain != written

    def test_the_end_at_once(self, written_once: Place) -> None:
        assert quiet(written_once.m3("chat")).out == ""


class TestInspect:
    def test_the_bank(self, written_once: Place) -> None:
        facts = quiet(written_once.m3("inspect", "--json")).json
        assert (facts["memories"], facts["quarantined"]) == (6, 0)
        assert facts["sources"] == {**{f"facts/{name}": 1 for name in FACTS}, "facts/birds.jsonl": 2}
        assert facts["spec"]["layers"] == [0, 1, 2, 3]
        assert facts["codec"]["kind"] == "scalar"
        plain = quiet(written_once.m3("inspect")).out
        assert "memories: 6\n" in plain
        assert "  facts/lamp.txt: 1\n" in plain

    def test_a_memory(self, written_once: Place) -> None:
        contents = written_once.contents()
        for id, reference in contents.references.items():
            facts = quiet(written_once.m3("inspect", id, "--json")).json
            assert facts == {
                "id": id,
                "source": reference.places[0].name,
                "heading": reference.heading,
                "places": [asdict(place) for place in reference.places],
                "text": reference.text,
                "tokens": reference.tokens,
                "block_bytes": len(contents.blocks[id]),
                "block": "good",
                "codec": "scalar",
            }
        assert "block: good\n" in written_once.m3("inspect", 0).out


class TestForget:
    def test_by_id(self, written: Place) -> None:
        question = QUESTIONS["facts/lamp.txt"]
        (lamp,) = search(written, question, "-k", 1)
        assert quiet(written.m3("forget", lamp["id"])).out == "1 memories forgotten\n"
        assert lamp["id"] not in [one["id"] for one in search(written, question, "-k", 9)]
        assert lamp["id"] not in [one["id"] for one in ask(written, question)["memories"]]
        assert "facts/lamp.txt" not in written.m3("inspect", "--json").json["sources"]
        assert len(written.contents().blocks) == 5

    def test_by_source(self, written: Place) -> None:
        names = ["facts/wall.html", "facts/bread.rst"]
        report = written.m3("forget", "--source", names[0], "--source", names[1], "--json").json
        assert len(report["forgotten"]) == 2
        assert not {one["source"] for one in search(written, "wall bread", "-k", 9)} & set(names)

    def test_what_is_written_again_has_a_new_id(self, written: Place) -> None:
        before = written.contents()
        (owl,) = search(written, "owl library", "-k", 1)
        written.m3("forget", owl["id"], owl["id"])
        report = written.m3("write", "facts", "--json").json
        assert (report["written"], report["known"]) == (1, 5)
        after = written.contents()
        assert owl["id"] not in after.texts
        assert after.texts[before.next_id] == owl["text"]
        assert search(written, "owl library", "-k", 1)[0]["id"] == before.next_id

    def test_everything(self, written: Place) -> None:
        written.m3("forget", *written.contents().blocks)
        assert written.contents().blocks == {}
        assert search(written, "owl") == []
        assert ask(written, "Who guards the library?")["memories"] == []
        assert written.m3("inspect", "--json").json["sources"] == {}
        assert written.m3("write", "facts", "--json").json["written"] == 6


class TestIndexFile:
    QUESTION = "Who guards the library?"

    def test_deleted_or_damaged_it_is_rebuilt(self, written: Place) -> None:
        index = written.bank / "index"
        good, found = index.read_bytes(), search(written, self.QUESTION)
        for content in (None, b"no index", good[:40] + b"\xff" + good[41:]):
            index.unlink()
            if content is not None:
                index.write_bytes(content)
            assert search(written, self.QUESTION) == found
            assert ask(written, self.QUESTION)["memories"][0]["id"] == found[0]["id"]
            mended = index.read_bytes()
            assert ask(written, self.QUESTION)["memories"][0]["id"] == found[0]["id"]
            assert index.read_bytes() == mended  # which was whole

    def test_of_another_bank_it_is_rebuilt(self, written: Place, place: Place) -> None:
        found = search(written, self.QUESTION)
        place.configure(codec={"kind": "raw"})
        place.text("other.txt", "Nothing of the library is here, nor of an owl.")
        place.m3("write", "other.txt")
        shutil.copy(place.bank / "index", written.bank / "index")
        assert search(written, self.QUESTION) == found

    def test_behind_the_home_it_catches_up(self, written: Place) -> None:
        old = (written.bank / "index").read_bytes()
        written.text("more.txt", "A glacier creaks above Tannhollow.")
        written.m3("write", "more.txt")
        written.m3("forget", search(written, "ferry", "-k", 1)[0]["id"])
        found = search(written, "glacier ferry", "-k", 9)
        (written.bank / "index").write_bytes(old)
        assert search(written, "glacier ferry", "-k", 9) == found


class TestConfig:
    def test_needs_neither_bank_nor_model(self, place: Place) -> None:
        place.configure(model={"path": "nowhere/at-all"})
        shown = quiet(place.m3("config", "--json", "--set", "recall.memories=2", M3_GENERATE__SEED="7")).json
        assert shown["config"]["recall"]["memories"] == 2
        assert shown["config"]["tiers"][0] == {"kind": "pinned", "capacity": "4MiB"}
        assert shown["origins"]["recall.memories"] == "--set"
        assert shown["origins"]["generate.seed"] == "M3_GENERATE__SEED"
        assert shown["origins"]["bank"] == "m3.yaml"
        assert shown["origins"]["index.kind"] == "default"

    def test_plain_has_a_line_for_each_key(self, place: Place) -> None:
        origins = place.m3("config", "--json").json["origins"]
        lines = quiet(place.m3("config")).out.splitlines()
        assert [(line.partition(": ")[0], line.rpartition("# ")[2]) for line in lines] == list(origins.items())
        assert any(line.startswith("recall.margin: null ") for line in lines)
        assert any(line.startswith("tiers.0.capacity: 4MiB ") for line in lines)

    def test_tiers_that_fit_the_machine_are_in_force_without_any(self, place: Place) -> None:
        place.configure(tiers=None)
        shown = place.m3("config", "--json").json
        assert [tier["kind"] for tier in shown["config"]["tiers"]][-2:] == ["pinned", "lmdb"]
        assert shown["origins"]["tiers.0.kind"] == "default"
        assert "tiers.0.kind: " in place.m3("config").out

    def test_another_file(self, place: Place) -> None:
        place.file.rename(place.folder / "other.yaml")
        for result in (
            place.m3("config", "-c", "other.yaml", "--json"),
            place.m3("config", "--json", M3_CONFIG="other.yaml"),
        ):
            assert result.json["origins"]["bank"] == "other.yaml"

    def test_it_works_from_another_folder(self, written: Place) -> None:
        elsewhere = Place(written.folder / "facts")
        assert len(search(elsewhere, "ferry", "--config", written.file)) == 5


def test_names_that_are_no_text(place: Place) -> None:
    name = "caf\udce9.txt"  # Latin-1, as a drive may have it
    place.text(name, "Coffee of the old town.")
    place.m3("write", name)
    assert place.m3("inspect", "--json").json["sources"] == {name: 1}
    assert "Coffee" in place.m3("search", "coffee").out
    assert place.m3("forget", "--source", name).code == 0


def test_the_default_tiers_do(place: Place) -> None:
    place.configure(tiers=None)
    place.m3("write", place.facts())
    assert len(ask(place, QUESTIONS["facts/lamp.txt"])["memories"]) > 0


def test_a_process_of_its_own(place: Place) -> None:
    result = place.process("write", place.facts(), "--json")
    assert result.json["written"] == 6
    assert result.err == ""
    assert ask(place, QUESTIONS["facts/lamp.txt"])["memories"]


def test_what_fails_while_an_interrupt_is_handled_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise TypeError("a kernel whose compilation was interrupted takes nothing")

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "m3: interrupted; nothing is half-written\n"


def test_an_error_of_no_interrupt_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda **_: {}["missing"])
    with pytest.raises(KeyError):
        cli.main()
