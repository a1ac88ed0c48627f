"""What evaluations share: journals, statistics, judging, reports."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.journal import Journal
from m3runtime.lab.evaluation.judging import is_invented, is_right
from m3runtime.lab.evaluation.laboratory import Choice
from m3runtime.lab.evaluation.plots import Plot, Series, draw
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean, ratio, separation
from m3runtime.lab.results import Spread, plain

VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=30)
RECORDS = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.lists(st.floats(-1, 1))))


class TestJournal:
    @given(st.lists(RECORDS, max_size=4), st.data())
    def test_what_was_added_is_there_and_a_torn_line_is_not(
        self, tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, object]], data: st.DataObject
    ) -> None:
        path = tmp_path_factory.mktemp("journal") / "of" / "it.jsonl"
        ends: dict[int, dict[str, object]] = {}
        with Journal(path, "ours") as journal:
            ends[path.stat().st_size] = {}
            for batch in batches:
                for key, value in batch.items():
                    journal.add({key: value})
                    ends[path.stat().st_size] = dict(journal.done)
        cut = data.draw(st.integers(min(ends), path.stat().st_size))
        path.write_bytes(path.read_bytes()[:cut])
        whole = max(end for end in ends if end <= cut)
        with Journal(path, "ours") as journal:
            assert journal.done == ends[whole]
            journal.add({"one more": [1]})
        with Journal(path, "ours") as journal:
            assert journal.done == {**ends[whole], "one more": [1]}

    @given(st.lists(st.integers(0, 99), max_size=20, unique=True), st.sets(st.integers(0, 99)), st.integers(1, 6))
    def test_what_is_missing_is_computed_in_the_batches_of_a_first_run(
        self, tmp_path_factory: pytest.TempPathFactory, tasks: list[int], done: set[int], size: int
    ) -> None:
        def compute(batch: Sequence[int]) -> list[list[int]]:
            computed.append(batch)
            return [list(batch)] * len(batch)  # a result that depends on its batch

        batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        whole = {str(task): batch for batch in batches for task in batch}
        known = {key: batch for key, batch in whole.items() if int(key) in done}
        computed: list[Sequence[int]] = []
        seen: list[tuple[int, int]] = []
        with Journal(tmp_path_factory.mktemp("journal") / "it.jsonl", "ours") as journal:
            journal.add(known)
            journal.fill(tasks, size, str, compute, lambda done, total: seen.append((done, total)))
            assert journal.done == whole
        assert computed == [batch for batch in batches if not done.issuperset(batch)]
        assert seen[-1] == (len(tasks), len(tasks))
        assert len(seen) == len(computed) + 1

    def test_a_file_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "it.jsonl"
        Journal(path, "theirs").close()
        before = path.read_bytes()
        with pytest.raises(InputError, match="an evaluation of other settings"):
            Journal(path, "ours")
        assert path.read_bytes() == before
        path.write_text("some notes\n")
        with pytest.raises(InputError, match="is not the journal"):
            Journal(path, "ours")
        assert path.read_text() == "some notes\n"

    def test_records_are_at_once_what_they_will_be_read_as(self, tmp_path: Path) -> None:
        with Journal(tmp_path / "it.jsonl", "ours") as journal:
            journal.add({"pair": (1, 2)})
            assert journal.done == {"pair": [1, 2]}


class TestStatistics:
    @given(VALUES, st.integers(0, 3))
    def test_a_mean_lies_in_its_interval_and_repeats_itself(self, values: list[float], seed: int) -> None:
        estimate = mean(values, seed)
        assert estimate == mean(values, seed)
        assert estimate.value == pytest.approx(np.mean(values))
        assert min(values) - 1e-6 <= estimate.low <= estimate.high <= max(values) + 1e-6
        assert estimate.count == len(values)

    def test_the_interval_holds_the_truth_about_as_often_as_it_says(self) -> None:
        drawing = np.random.default_rng(0)
        held = 0
        for seed in range(100):
            estimate = mean(drawing.normal(3.0, 1.0, 60).tolist(), seed)
            held += estimate.low <= 3.0 <= estimate.high
        assert 88 <= held <= 99

    def test_a_ratio_is_resampled_in_pairs(self) -> None:
        values = [float(value) for value in range(1, 40)]
        exactly = ratio([2 * value for value in values], values)
        assert (exactly.value, exactly.low, exactly.high) == pytest.approx((2, 2, 2))
        shuffled = ratio([2 * value for value in reversed(values)], values)
        assert shuffled.value == pytest.approx(2)
        assert shuffled.low < 1.8 < 2.2 < shuffled.high

    @given(VALUES, VALUES)
    def test_a_separation_is_of_all_pairs(self, values: list[float], others: list[float]) -> None:
        estimate = separation(values, others)
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in values for b in others]
        assert estimate.value == pytest.approx(np.mean(pairs))
        assert estimate.value + separation(others, values).value == pytest.approx(1)
        assert 0 <= estimate.low <= estimate.value + 1e-9
        assert estimate.value - 1e-9 <= estimate.high <= 1

    def test_ratios_to_nothing(self) -> None:
        assert ratio([1.0, 0.0], [0.0, 0.0]).value == float("inf")
        assert ratio([0.0, 0.0], [0.0, 0.0]).value == 1
        some = ratio([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])  # and some resamples have nothing to compare with
        assert (some.value, some.high) == (2, float("inf"))
        with pytest.raises(ValueError, match="as many values"):
            ratio([1.0], [1.0, 2.0])
        with pytest.raises(ValueError, match="no values"):
            mean([])


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        (" It was built in 1874.", ["1874"], True),
        (" 18741", ["1874"], False),
        (" LANOLIN, they say", ["lanolin"], True),
        (" thirty-seven steps", ["thirty-seven", "37"], True),
        (" sunflower oil", ["flower"], False),
        ("", ["1874"], False),
        (" anything", [], False),
    ],
)
def test_a_right_answer_is_said_in_whole_words(text: str, accepted: list[str], right: bool) -> None:
    assert is_right(text, accepted) is right


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        (" 1874", True),
        (" The fine is 30 crowns, not 20.", True),
        ("", False),
        (" The text does not say.", False),
        (" I don't know.", False),
        (" It isn’t known who built it.", False),
        (" No information is given.", False),
        (" Unknown.", False),
    ],
)
def test_who_owns_up_to_not_knowing_invents_nothing(text: str, invented: bool) -> None:
    assert is_invented(text) is invented


def report(**changes: object) -> Report:
    one = Estimate(0.5, 0.4, 0.6, 10)
    given = {
        "title": "A title",
        "command": "m3 eval facts",
        "settings": {"seed": 1},
        "config": {"bank": "b"},
        "fingerprints": {"bank": "f" * 32},
        "summary": ("A finding.",),
        "tables": (Table("Answers", ("mode", "exact"), (("memory | text", one), ("none", 0.25))),),
        "plots": (Plot("bars", "Bars", "y", (Series("a", (one, one)),), ("x", "y")),),
        "results": {"answers": {1: one, "infinite": float("inf")}},
    }
    return Report(**{**given, **changes})  # type: ignore[arg-type]


def test_a_report_is_files_that_say_all(tmp_path: Path) -> None:
    report().save(tmp_path / "there")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        "report.json",
        "report.md",
        "bars.png",
        "bars.svg",
    }
    read = json.loads((tmp_path / "there/report.json").read_text())
    assert read["results"] == {
        "answers": {"1": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 10}, "infinite": "inf"}
    }
    text = (tmp_path / "there/report.md").read_text()
    assert "| memory \\| text | 0.500 (0.400 to 0.600) |" in text
    assert "- A finding." in text
    assert "![Bars](bars.png)" in text


def test_equal_plots_give_equal_files(tmp_path: Path) -> None:
    one = Estimate(0.5, 0.4, 0.6, 10)
    lines = Plot("lines", "Lines", "y", (Series("a", (one, one), (1, 8)), Series("b", (one,), (2,))), x="k")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        draw(lines, tmp_path / folder)
    for name in ("lines.png", "lines.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one/lines.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    report().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = Plot("bars", "Bars", "y", (Series("a", (), (1.0, 2.0)),))
    with pytest.raises(ValueError, match="must have the same size"):
        report(plots=(bad,), title="new").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_plain_values_are_json() -> None:
    value = plain({"choice": Choice(1, 0.5), "path": Path("a/b"), "rows": ((1, 2), [3])})
    assert json.loads(json.dumps(value)) == value


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9))
def test_rounds_are_compared_in_pairs(rounds: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*rounds, strict=True)
    spread = Spread.ratio(ours, theirs)
    assert spread.low <= spread.median <= spread.high
    assert spread.median == pytest.approx(np.median([one / other for one, other in rounds]))
    assert spread.rounds == len(rounds)
    assert difference(ours, theirs).value == pytest.approx(np.mean(ours) - np.mean(theirs))
    with pytest.raises(ValueError, match="zip"):
        Spread.ratio(ours, theirs[1:])
