"""``m3 eval facts``, with a tiny model: that it runs, goes on after a stop, and repeats itself."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
from m3runtime.lab.evaluation.facts_grounding import without_figures
from m3runtime.lab.evaluation.modes import MODES, NEEDS_ANSWER
from m3runtime.plugins import loading as plugins
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace

FEW = FactsSettings(seed=3, references=14, questions=6, unanswerable=3, batch=4, max_new_tokens=4, timed=2)
ARGUMENTS = ("--seed", "3", "--references", "14", "--questions", "6", "--unanswerable", "3")


class Stopped(Exception):  # noqa: N818 - like KeyboardInterrupt
    """The user's patience is at an end."""


@pytest.fixture
def place(place: Place) -> Place:
    place.configure(memory={"reference_tokens": 400})
    return place


@pytest.fixture(scope="module")
def reported(new_place: NewPlace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Any]:
    """A place with the folder ``report`` of one evaluation, and what the command printed. Only for looking at."""
    place = new_place(tmp_path_factory.mktemp("reported"))
    place.configure(memory={"reference_tokens": 400})
    return place, place.m3("eval", "facts", "--out", "report", *ARGUMENTS, "--json").json


@pytest.fixture(scope="module")
def whole(reported: tuple[Place, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of `FEW`, of a run that nothing stopped."""
    return run_of(reported[0], tmp_path_factory.mktemp("whole") / "report")


def run_of(place: Place, folder: Path, settings: FactsSettings = FEW, **changes: Any) -> Any:
    config = Config.load(place.file, {})
    run = FactsRun(config, settings, folder)
    return run.run(assembly.open_adapter(config), **changes)


def stopping_at(stage: str, after: int) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, _: int) -> None:
        if now == stage and done >= after:
            raise Stopped

    return progress


def test_the_report_has_every_mode_and_what_is_needed_to_repeat_it(reported: tuple[Place, Any]) -> None:
    place, printed = reported
    folder = place.folder / "report"
    report = json.loads((folder / "report.json").read_text())
    assert report == printed
    assert set(report["results"]["answers"]) == set(MODES)
    for mode, answers in report["results"]["answers"].items():
        assert len(answers) == (6 if mode in NEEDS_ANSWER else 9)
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "report.md", "exact.png", "exact.svg", "likelihood.png", "likelihood.svg",
        "answers-questions.jsonl", "bank",
    }  # fmt: skip
    assert report["settings"]["seed"] == 3
    assert report["config"]["model"]["path"].endswith("tiny-llama")
    assert {"model", "tokenizer", "embedder", "codec", "bank"} <= set(report["fingerprints"])
    assert {"python", "torch", "machine"} <= set(report["environment"])
    text = (folder / "report.md").read_text()
    assert report["command"] in text
    assert all(f"| {mode} |" in text for mode in MODES)
    assert not place.bank.exists(), "the user's bank is left alone"


def test_the_same_seed_gives_the_same_report(place: Place, reported: tuple[Place, Any]) -> None:
    one = copy.deepcopy(reported[1])
    two = place.m3("eval", "facts", "--out", "report", *ARGUMENTS, "--json").json
    for report in (one, two):
        del report["measured"]
        report["config"].pop("bank")
        report["tables"] = [table for table in report["tables"] if table["title"] != "Speed"]
    assert one == two
    few = ("--references", "6", "--questions", "1", "--unanswerable", "0")
    other = place.m3("eval", "facts", "--out", "other", "--seed", "4", *few, "--json").json
    asked, (asked_now,) = ([each["asked"] for each in of["results"]["questions"].values()] for of in (one, other))
    assert asked_now not in asked


@pytest.mark.parametrize("stage", ["text", "memory", "memory-oracle"])
def test_a_stopped_evaluation_goes_on_and_ends_alike(place: Place, whole: Any, tmp_path: Path, stage: str) -> None:
    with pytest.raises(Stopped):
        run_of(place, tmp_path / "parts", progress=stopping_at(stage, 4))
    journal = (tmp_path / "parts/answers-questions.jsonl").read_bytes()
    assert f"{stage}/".encode() in journal
    seen: list[tuple[str, int]] = []
    resumed = run_of(place, tmp_path / "parts", progress=lambda stage, done, _: seen.append((stage, done)))
    assert (tmp_path / "parts/answers-questions.jsonl").read_bytes().startswith(journal), "nothing is asked twice"
    assert (stage, 0) not in seen
    assert (resumed.items, without_figures(resumed.answers)) == (whole.items, without_figures(whole.answers))


def test_other_settings_do_not_go_on_from_here(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_of(place, tmp_path / "there", progress=stopping_at("text", 4))
    place.configure(recall={"memories": 2})
    with pytest.raises(InputError, match=r"answers-questions.jsonl: an evaluation of other settings"):
        run_of(place, tmp_path / "there")
    result = place.m3("eval", "facts", "--out", str(tmp_path / "there"), *ARGUMENTS, "--json")
    assert "choose another --out" in result.complaint
    # Nor does another seed put its references beside those that are there.
    before = Place(tmp_path / "there").bank.joinpath("home/data.mdb").read_bytes()
    result = place.m3("eval", "facts", "--out", str(tmp_path / "there"), *ARGUMENTS, "--seed", "4", "--json")
    assert "remembers other texts" in result.complaint
    assert Place(tmp_path / "there").bank.joinpath("home/data.mdb").read_bytes() == before


def test_what_is_the_same_is_asked_once(place: Place, tmp_path: Path) -> None:
    place.configure(recall={"memories": 1, "min_score": -1})
    seen: dict[str, list[int]] = {}

    def progress(stage: str, _: int, total: int) -> None:
        seen.setdefault(stage, []).append(total)

    results = run_of(place, tmp_path / "report", progress=progress)
    assert results.answers["text-1"] == results.answers["text"]
    assert set(seen["text-1"]) == {0}
    wrong = [item for item in results.items if item.right is not None and item.nearest[0].id != item.right]
    assert set(seen["text-oracle"]) == {len(wrong)}
    for item in results.items:
        if item.right is not None and item not in wrong:
            assert results.answers["text-oracle"][item.key] == results.answers["text"][item.key]
    assert set(seen["text-5"]) == {9}


def test_too_many_questions_are_refused_before_anything_is_loaded(place: Place) -> None:
    assert (
        "questions: must be between 1 and 6"
        in place.m3("eval", "facts", "--references", "3", "--questions", "500").complaint
    )
    assert not (place.folder / "eval-facts").exists()


def keys(answers: dict[str, Any]) -> Iterable[str]:
    return answers["memory"].keys()


def test_memory_modes_read_what_they_say(whole: Any) -> None:
    results = whole
    for item in results.items:
        assert results.answers["memory"][item.key]["recalled"][0] == [match.id for match in item.recalled]
        if item.right is not None:
            assert results.answers["memory-oracle"][item.key]["recalled"][0] == [item.right]
    some = [item for item in results.items if item.right is not None]
    assert any(item.recalled and item.recalled[0].id != item.right for item in some) or len(some) > 1
    none, oracle = (
        [results.answers[mode][item.key]["log_probs"] for item in some] for mode in ("none", "memory-oracle")
    )
    assert none != oracle
    read = [timing.bytes for timing in results.timings if timing.mode == "memory"]
    assert sum(of["lmdb"] for of in read) > 0
    assert all(sum(timing.bytes.values()) == 0 for timing in results.timings if timing.mode == "none")


@pytest.mark.parametrize("command", [["facts"], ["text", "--corpus", "."], ["sweep"], ["calibrate"]])
def test_a_missing_extra_is_named_before_anything_is_done(place: Place, command: list[str]) -> None:
    with patch.object(plugins, "find_spec", lambda name: None if name == "scipy" else name):
        complaint = place.m3("eval", *command).complaint
    assert complaint == "m3: m3 eval needs scipy: pip install 'm3runtime[eval]'"
    assert [path.name for path in place.folder.iterdir()] == ["m3.yaml"]
