"""``m3 eval calibrate``, with a tiny model: that it runs, writes the file, goes on after a stop, and repeats itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.calibrate import CalibrationResults, CalibrationSettings, calibrate
from m3runtime.lab.evaluation.choosing import Setting
from m3runtime.lab.evaluation.yaml_edit import MARK
from tests.end_to_end.commands import Place, contents

FEW = CalibrationSettings(seed=3, statements=10, batch=4)
ARGUMENTS = ("--seed", "3", "--statements", "10", "--batch", "4")
TOWNS = (
    "Uskerfold", "Brannoch", "Kesmaroon", "Ambelow", "Zandermoor", "Tibbering", "Oldwick", "Fennmark", "Pipershill",
    "Murrow", "Tallow", "Hobbel",
)  # fmt: skip


class Stopped(Exception):  # noqa: N818 - like KeyboardInterrupt
    """The user's patience is at an end."""


@pytest.fixture(scope="module")
def town_bank(tmp_path_factory: pytest.TempPathFactory, new_place: Callable[[Path], Place]) -> Place:
    """A bank of towns, one reference each. Only for looking at."""
    place = new_place(tmp_path_factory.mktemp("towns"))
    place.configure(memory={"reference_tokens": 400})
    for number, town in enumerate(TOWNS):
        text = f"The harbour of {town} was opened by keepers in {1400 + 7 * number}. Walnut oil burns in all its lamps."
        place.text(f"towns/{town}.txt", text)
    place.text("towns/other.txt", "Nothing here.")
    assert place.m3("write", "towns", "--json").code == 0
    return place


@pytest.fixture
def place(town_bank: Place, tmp_path: Path) -> Place:
    """A configuration of one's own over that bank."""
    (tmp_path / "place").mkdir()
    file = tmp_path / "place/m3.yaml"
    settings = town_bank.file.read_text().replace("./bank", str(town_bank.bank))
    file.write_text("# mine\n" + settings)
    return Place(tmp_path / "place")


def run_of(place: Place, folder: Path, settings: CalibrationSettings = FEW, **changes: Any) -> CalibrationResults:
    config = Config.load(place.file, {})
    return calibrate(config, settings, folder, lambda: assembly.open_adapter(config), **changes)


def test_it_chooses_writes_the_file_and_says_why(place: Place) -> None:
    before, config = contents(place.file), Config.load(place.file, {})
    lines = place.file.read_text().splitlines()
    result = place.m3("eval", "calibrate", "--out", "report", *ARGUMENTS)
    assert result.code == 0, result.err
    folder = place.folder / "report"
    report = json.loads((folder / "report.json").read_text())
    chosen = report["results"]["chosen"]
    after = Config.load(place.file, {})
    assert after == config.model_copy(update={"recall": config.recall.model_copy(update=chosen)})
    text = place.file.read_text()
    assert text.count(MARK) == 3
    assert f"memories: {chosen['memories']}  {MARK}" in text
    assert "was 5; log-likelihood" in text
    assert "10 statements" in text
    assert [line for line in lines if "min_score" not in line] == [
        line for line in text.splitlines() if MARK not in line
    ]
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "report.md", "memories.png", "memories.svg", "scores.jsonl"
    }  # fmt: skip
    assert f"Chosen: memories {chosen['memories']}" in result.out
    assert str(place.file.name) in result.out
    assert len(report["results"]["statements"]) == 10
    assert contents(place.file).blocks == before.blocks

    again = place.m3("eval", "calibrate", "--out", "report", *ARGUMENTS)
    assert again.code == 0, "what was scored before the file changed is used again"
    assert place.file.read_text().count(MARK) == 3
    assert f"was {chosen['memories']}; log-likelihood" in place.file.read_text()


def test_a_dry_run_prints_the_file_and_leaves_it(place: Place) -> None:
    before = place.file.read_bytes()
    place.file.chmod(0o444)
    result = place.m3("eval", "calibrate", "--out", "report", *ARGUMENTS, "--dry-run")
    assert result.code == 0, result.err
    assert place.file.read_bytes() == before
    assert "Chosen:" in result.err
    place.file.chmod(0o644)
    assert place.m3("eval", "calibrate", "--out", "report", *ARGUMENTS).code == 0
    assert place.file.read_text() == result.out


def test_the_same_seed_gives_the_same_report(place: Place) -> None:
    one, two, other = (
        place.m3("eval", "calibrate", "--out", f"report-{out}", *ARGUMENTS, *more, "--dry-run", "--json").json
        for out, more in (("one", ()), ("two", ()), ("other", ("--seed", "4")))
    )
    assert one == two
    assert one["written"] is False
    assert one["results"]["statements"] != other["results"]["statements"]


def test_a_statement_is_scored_with_and_without_its_own_reference(place: Place, tmp_path: Path) -> None:
    results = run_of(place, tmp_path / "report")
    found = 0
    for statement, pair in zip(results.statements.made, results.pairs, strict=True):
        assert statement.reference not in [match.id for match in pair.unknown.nearest]
        found += statement.reference in [match.id for match in pair.known.nearest]
        for case in (pair.known, pair.unknown):
            counts = {setting.recalled(case.nearest) for setting in results.settings}
            assert counts <= set(case.log_likelihood)
            assert all(value < 0 for value in case.log_likelihood.values())
        assert pair.known.log_likelihood[0] == pair.unknown.log_likelihood[0]
        assert len(set(pair.known.log_likelihood.values())) > 1, "memories make a difference"
    assert found >= 8
    assert results.former == Setting(5, 0.1, None)
    assert {statement.answer.strip() for statement in results.statements.made} & {"1400", "1407", "1414"}


def test_scores_are_those_of_serving(place: Place, tmp_path: Path) -> None:
    """What the model finds of a statement through the runtime itself, under the configuration's own setting."""
    from statistics import fmean

    from m3runtime.adapters.answers import Prompt
    from m3runtime.runtime import Runtime

    results = run_of(place, tmp_path / "report")
    config = Config.load(place.file, {})
    adapter = assembly.open_adapter(config)
    with Runtime.open(config, read_only=True) as runtime:
        for statement, pair in zip(results.statements.made[:4], results.pairs, strict=False):
            with runtime.stream(adapter.dtype) as stream:
                prompt = Prompt(statement.prompt, query=statement.prompt)
                (score,) = adapter.score([prompt], [statement.answer], [stream])
            assert fmean(score.log_probs) == pytest.approx(pair.known.under(results.former), abs=1e-4)


@pytest.mark.parametrize("after", [1, 12])
def test_a_stopped_calibration_goes_on_and_ends_alike(place: Place, tmp_path: Path, after: int) -> None:
    def stop(stage: str, done: int, _: int) -> None:
        if done >= after:
            raise Stopped

    whole = run_of(place, tmp_path / "whole")
    with pytest.raises(Stopped):
        run_of(place, tmp_path / "parts", progress=stop)
    journal = (tmp_path / "parts/scores.jsonl").read_bytes()
    assert journal.count(b"\n") > after
    assert run_of(place, tmp_path / "parts") == whole
    assert (tmp_path / "parts/scores.jsonl").read_bytes().startswith(journal), "nothing is scored twice"


def test_other_settings_do_not_go_on_from_here(place: Place, tmp_path: Path) -> None:
    run_of(place, tmp_path / "there")
    place.configure(recall={"score_temperature": 0.5})
    with pytest.raises(InputError, match=r"scores.jsonl: an evaluation of other settings"):
        run_of(place, tmp_path / "there")


def test_values_that_are_overridden_are_named(place: Place) -> None:
    result = place.m3(
        "eval", "calibrate", "--dry-run", *ARGUMENTS, "--set", "recall.margin=0.5", M3_RECALL__MEMORIES="2"
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "m3: recall.memories is set by M3_RECALL__MEMORIES, which goes before what the file says\n" in result.err
    assert "m3: recall.margin is set by --set" in result.err
    assert "recall.min_score is set" not in result.err
    assert "was 2; " in result.out


# Bad input: one clear line, and nothing is changed


def test_without_a_bank_nothing_is_changed(place: Place) -> None:
    place.configure(bank="./nowhere")
    before = place.file.read_bytes()
    assert "there is no bank at" in place.m3("eval", "calibrate").complaint
    assert place.file.read_bytes() == before
    assert not (place.folder / "eval-calibrate").exists()


def test_a_bank_that_gives_too_few_statements(written: Place) -> None:
    before = written.file.read_bytes()
    complaint = written.m3("eval", "calibrate").complaint
    assert "references of the bank give" in complaint
    assert "at least 8 are needed" in complaint
    assert written.file.read_bytes() == before
    ids = contents(written.file).blocks
    assert written.m3("forget", *ids).code == 0
    assert "0 references of the bank give 0 statements" in written.m3("eval", "calibrate").complaint


def test_a_read_only_file_is_refused_before_anything_is_done(place: Place) -> None:
    before = place.file.read_bytes()
    place.file.chmod(0o444)
    assert "m3.yaml is read-only" in place.m3("eval", "calibrate").complaint
    assert place.file.read_bytes() == before
    assert not (place.folder / "eval-calibrate").exists()


def test_a_file_that_cannot_be_changed_is_refused_before_anything_is_done(place: Place) -> None:
    shared = place.file.read_text().replace("min_score: 0.1", "memories: &n 5")
    place.file.write_text(shared + "index: {expansion_add: *n}\n")
    complaint = place.m3("eval", "calibrate").complaint
    assert "recall cannot be changed here" in complaint
    assert not (place.folder / "eval-calibrate").exists()


def test_too_few_statements_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8"):
        calibrate(None, CalibrationSettings(statements=3), Path(), lambda: None)  # type: ignore[arg-type,return-value]
