"""``m3 eval budgets``, with a tiny model: what it fits, and a bank that is written with it."""

from pathlib import Path

import pytest

from tests.end_to_end.commands import Place

TOWNS = [f"{first}{last}" for first in ("Usker", "Brann", "Kesma", "Ambe") for last in ("fold", "och", "roon", "low")]


@pytest.fixture
def towns(place: Place) -> str:
    for number, town in enumerate(TOWNS):
        place.text(f"towns/{town}.txt", f"The harbour of {town} was opened by old keepers in {1400 + 7 * number}.")
    return "towns"


@pytest.mark.parametrize("codec", [{"kind": "scalar", "bits": 4}, {"kind": "raw"}])
def test_a_bank_is_written_with_budgets_and_read(place: Place, towns: str, codec: dict[str, object]) -> None:
    fit = place.m3("eval", "budgets", "--corpus", towns, "--tokens", "6", "--references", "12", "--json").json
    budgets = fit["results"]["budgets"]
    assert fit["summary"][-1] == f"Set: memory.tokens_per_head: {budgets}"
    assert (len(budgets), {len(layer) for layer in budgets}) == (4, {2})
    assert fit["results"]["mean"] == pytest.approx(6, abs=0.3)
    with_budgets, even = fit["results"]["held"]
    assert with_budgets > even
    assert (place.folder / "eval-budgets" / "report.md").exists()
    assert not place.bank.exists()

    place.configure(memory={"tokens_per_head": budgets}, codec={**codec})
    assert place.m3("write", towns, "--json").code == 0
    assert place.m3("verify", "--json").code == 0
    told = place.m3("inspect", "--json").json
    assert told["spec"]["budgets"] == budgets
    answer = place.m3("ask", f"When was the harbour of {TOWNS[3]} opened?", "--json").json
    assert answer["memories"]
    planned = place.m3("plan", "--references", "16", "--json").json
    assert planned["spec"]["budgets"] == budgets

    place.configure(memory={"tokens_per_head": 6})
    complaint = place.m3("ask", "When?").complaint
    assert "was written with another spec: " in complaint
    assert "budgets of " in complaint
    assert len(complaint) < 400


def test_what_cannot_be_fitted_is_refused_in_one_line(place: Place, tmp_path: Path) -> None:
    place.text("one.txt", "The harbour of Uskerfold was opened by old keepers in 1431.")
    out = ("--out", tmp_path / "out")
    assert (
        "give 1 references, and at least 4 are needed"
        in place.m3("eval", "budgets", "--corpus", "one.txt", *out).complaint
    )
    assert (
        "nowhere is neither a file nor a folder" in place.m3("eval", "budgets", "--corpus", "nowhere", *out).complaint
    )
    place.configure(memory={"tokens_per_head": [[3, 4]]})
    complaint = place.m3("write", "one.txt").complaint
    assert "memory.tokens_per_head: the model has 4 memory layers of 2 KV heads, not 1 lists of 2" in complaint
