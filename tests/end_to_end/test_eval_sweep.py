"""``m3 eval sweep`` with a tiny model, and that its laboratory measures what a runtime delivers."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
from m3runtime.lab.evaluation.sweep import SweepRun, SweepSettings
from m3runtime.lab.evaluation.trials import Trials
from m3runtime.lab.evaluation.world import make_world
from tests.end_to_end.commands import Place

pytestmark = pytest.mark.long

SIZES = ("--references", "8", "--questions", "2", "--batch", "2")


@pytest.fixture
def place(place: Place) -> Place:
    """With room for references of the tiny tokenizer, and exact scores."""
    place.configure(memory={"reference_tokens": 400}, index={"dtype": "f32"})
    return place


@pytest.mark.parametrize("names_weight", [0.0, 1.0])
def test_a_trial_measures_what_a_runtime_delivers(place: Place, tmp_path: Path, names_weight: float) -> None:
    place.configure(recall={"names_weight": names_weight})
    config = Config.load(place.file, {})
    settings = FactsSettings(seed=2, references=16, questions=5, unanswerable=0, batch=5, max_new_tokens=4, timed=1)
    run = FactsRun(config, settings, tmp_path / "facts")
    adapter = assembly.open_adapter(run.config)
    whole = run.run(adapter, modes=("none", "text", "memory"))
    world = make_world(2, references=16, questions=5, unanswerable=0)
    trials = Trials(run.config, adapter, world, batch=5)
    for mode in ("none", "text", "memory"):
        expected = [fmean(whole.answers[mode][item.key]["log_probs"]) for item in whole.items]
        trial = trials.run(mode, {})
        assert trial.log_probs == pytest.approx(expected, abs=2e-3)
        assert list(trial.right) == [float(whole.answers[mode][item.key]["right"]) for item in whole.items]
    assert trial.recalled == fmean(len(item.recalled) for item in whole.items)
    home = assembly.open_bank(run.config, read_only=True)
    try:
        assert trial.bytes == pytest.approx(home.home.stored_bytes() / 16, rel=0.2)  # pages of the database included
    finally:
        home.close()


def test_every_setting_is_tried_and_one_of_each_is_recommended(place: Place) -> None:
    report = place.m3("eval", "sweep", "--out", "report", *SIZES, "--json").json
    folder = place.folder / "report"
    assert json.loads((folder / "report.json").read_text()) == report
    tried = report["results"]["axes"]
    assert set(tried) >= {"prompt", "memories", "margin", "score floor", "sinks", "positions", "layers", "codec"}
    assert all(len(options) >= 2 for options in tried.values())
    assert all((folder / f"{name.replace(' ', '-')}.png").exists() for name in tried)
    kept = report["results"]["recommended"]
    assert len(kept) == len(tried)
    assert "**kept**" in (folder / "report.md").read_text()


def test_it_goes_on_from_where_it_was_and_ends_alike_from_the_start(place: Place) -> None:
    sweep = ("eval", "sweep", *SIZES, "--axis", "memories", "--axis", "margin", "--json", "--out")
    report = place.m3(*sweep, "report").json
    journal = (place.folder / "report/sweep.jsonl").read_bytes()
    assert place.m3(*sweep, "report").json == report
    assert (place.folder / "report/sweep.jsonl").read_bytes() == journal, "nothing is tried again"
    assert place.m3(*sweep, "again").json["results"] == report["results"]


def test_one_setting_alone_and_chunk_lengths_on_real_text(place: Place) -> None:
    place.text(
        "corpus/one.txt", "\n\n".join(f"The lamp of house {number} burns oil {number}." for number in range(400))
    )
    report = place.m3(
        "eval", "sweep", "--axis", "memories", "--corpus", "corpus", "--out", "report", *SIZES, "--json"
    )  # fmt: skip
    assert "room for" in report.complaint  # twenty passages are more than a file has
    for number in range(12):
        lines = (f"The lamp {number} of house {line} burns oil of {line * number}." for line in range(90))
        place.text(f"corpus/{number}.txt", "\n\n".join(lines))
    report = place.m3(
        "eval", "sweep", "--axis", "memories", "--corpus", "corpus", "--out", "report", *SIZES, "--json"
    ).json  # fmt: skip
    assert set(report["results"]["axes"]) == {"memories"}
    assert set(report["results"]["recommended"]) == {"recall.memories"}
    assert [chunk["tokens"] for chunk in report["results"]["chunks"]] == [16, 32, 64, 96]
    assert "--axis 'memories' --corpus corpus" in report["command"]


def test_an_unknown_setting_is_refused(place: Place) -> None:
    complaint = place.m3("eval", "sweep", "--axis", "memory", *SIZES, "--json").complaint
    assert "--axis memory is not known; known are prompt, " in complaint


def test_a_stopped_sweep_ends_alike(place: Place, tmp_path: Path) -> None:
    config = Config.load(place.file, {})
    settings = SweepSettings(seed=1, references=12, questions=4, batch=4, max_new_tokens=4, axes=("memories", "margin"))
    whole = SweepRun(config, settings, tmp_path / "whole").run(assembly.open_adapter(config))

    def impatient(stage: str, done: int, _: int) -> None:
        if stage == "Trying margin" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SweepRun(config, settings, tmp_path / "parts").run(assembly.open_adapter(config), impatient)
    assert SweepRun(config, settings, tmp_path / "parts").run(assembly.open_adapter(config)) == whole
