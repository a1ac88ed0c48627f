"""``m3 eval calibrate-attention``, with a tiny model: what it measures, and that it changes nothing."""

from pathlib import Path

import pytest

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.attention import AXES, AttentionSettings, Reading, calibrate_attention
from m3runtime.lab.evaluation.attention_report import attention_report
from m3runtime.lab.evaluation.statistics import difference
from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import NewPlace

FEW = AttentionSettings(seed=3, statements=16, batch=8)
TOWNS = [f"{first}{last}" for first in ("Usker", "Brann", "Kesma", "Ambe") for last in ("fold", "och", "roon", "low")]


@pytest.fixture(scope="module")
def town_bank(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> Place:
    """A bank of towns, one reference each. Only for looking at."""
    place = new_place(tmp_path_factory.mktemp("towns"))
    for number, town in enumerate(TOWNS):
        place.text(f"towns/{town}.txt", f"The harbour of {town} was opened by old keepers in {1400 + 7 * number}.")
    assert place.m3("write", "towns", "--json").code == 0
    return place


def test_each_half_judges_what_the_other_chooses(town_bank: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXES, "attention_weight", (1.0, 8.0))  # type: ignore[arg-type]
    monkeypatch.setitem(AXES, "attention_temperature", (1.0, 0.5))  # type: ignore[arg-type]
    stored = town_bank.bank.joinpath("home/data.mdb").read_bytes()
    config = Config.load(town_bank.file, {})
    results = calibrate_attention(config, FEW, lambda: assembly.open_adapter(config))
    assert results.former == Reading(1.0, 1.0)
    assert {reading.attention_weight for reading in results.tried} == {1.0, 8.0}
    assert {reading.attention_temperature for reading in results.tried} == {1.0, 0.5}
    assert len({sum(values) for values in results.tried.values()}) == len(results.tried), (
        "every knob changes what is read"
    )
    size = len(results.tried[results.former])
    assert size <= 16
    before = results.former
    for step in results.steps:
        first, second = (results.tried[one] for one in step.by_halves)
        crossed = (*second[: size // 2], *first[size // 2 :])
        assert step.gained == difference(crossed, results.tried[before], FEW.seed)
        assert step.kept == (step.by_all if step.gained.low > 0 else before)
        before = step.kept
    assert results.advised == before
    report = attention_report(results, FEW, config)
    assert report.summary[-1].startswith("Set: memory.attention_temperature: ")
    assert report.markdown().count("| 0.5 |") >= 1
    assert town_bank.bank.joinpath("home/data.mdb").read_bytes() == stored


def test_a_bank_of_few_statements_is_refused(town_bank: Place, place: Place, tmp_path: Path) -> None:
    place.text("one.txt", "The harbour of Uskerfold was opened by old keepers in 1431.")
    assert place.m3("write", "one.txt", "--json").code == 0
    complaint = place.m3("eval", "calibrate-attention", "--out", tmp_path / "out").complaint
    assert "at least 8 are needed" in complaint
    nothing = ("--set", "recall.min_score=1", "--out", tmp_path / "out")
    complaint = town_bank.m3("eval", "calibrate-attention", *nothing).complaint
    assert "a search finds the own reference of 0 of this bank's 16 statements first" in complaint
    config = Config.load(town_bank.file, {})
    with pytest.raises(InputError, match="at least 16 are needed"):
        calibrate_attention(config, AttentionSettings(statements=15), lambda: assembly.open_adapter(config))
