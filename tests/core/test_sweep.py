"""The rule by which a sweep chooses, and how it names what it tried."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.sweep import CODECS, Axis, SweepResults, SweepSettings, Tried, Walked, axes, choose
from m3runtime.lab.evaluation.sweep_report import shown, sweep_report
from m3runtime.lab.evaluation.trials import Trial, changed
from m3runtime.memory.spec import MemorySpec
from m3runtime.plugins.construction import construct
from m3runtime.plugins.loading import load

BASE = Config.model_validate({"bank": "b", "model": {"path": "m"}, "embedder": {"path": "e", "options": 1}})
ROWS = st.lists(st.lists(st.floats(-5, 0), min_size=8, max_size=8), min_size=1, max_size=5)


def trial(log_probs: list[float], right: list[float] | None = None) -> Trial:
    return Trial(tuple(right or [1.0] * len(log_probs)), tuple(log_probs), 0.0, 0.0)


@given(ROWS, st.integers(0, 5))
def test_what_is_kept_is_the_first_that_is_not_told_from_the_best(rows: list[list[float]], seed: int) -> None:
    kept, less_exact, less_likely = choose([trial(row) for row in rows], seed)
    sums = [sum(row) for row in rows]
    assert {estimate.value for estimate in less_exact} == {0.0}
    assert less_likely[sums.index(max(sums))].value == 0
    assert less_likely[kept].low <= 0
    assert all(less_likely[earlier].low > 0 for earlier in range(kept))
    assert choose([trial(row) for row in rows], seed) == (kept, less_exact, less_likely)


def test_a_clear_best_is_kept_and_a_refused_option_never() -> None:
    drawing = np.random.default_rng(0)
    level = drawing.normal(-2, 1, 50)
    rows = [(level - 1).tolist(), level.tolist(), (level + drawing.normal(0.001, 1, 50)).tolist()]
    kept, less_exact, less_likely = choose([Trial((), (), 0, 0), *map(trial, rows)], 0)
    assert kept == 2
    assert less_likely[1].low > 0.5
    assert less_likely[0].value == less_exact[0].value == float("inf")


def test_exact_answers_come_first_and_likelihoods_decide_between_equals() -> None:
    drawing = np.random.default_rng(0)
    level = drawing.normal(-2, 1, 60)
    likely = [level + 1, level - 1, level]
    right = [[0.0] * 40 + [1.0] * 20, [1.0] * 50 + [0.0] * 10, [0.0] * 11 + [1.0] * 49]
    found = [trial(values.tolist(), hits) for values, hits in zip(likely, right, strict=True)]
    kept, less_exact, _ = choose(found, 0)
    assert kept == 2, "the first is likelier and gives far fewer answers; of the others, this is the likelier"
    assert less_exact[0].low > 0
    assert less_exact[2].low <= 0


def test_every_option_is_a_configuration() -> None:
    tried = [(axis, option) for axis in axes(30, 128) for option in axis.options]
    names = [axis.name for axis in axes(30, 128)]
    assert {"memories", "margin", "score floor", "tokens per head", "layers", "codec", "sinks", "positions"} <= {*names}
    seen = set()
    for axis, option in tried:
        config = changed(BASE, option)
        seen.add((axis.name, shown(option)))
        for key, value in option.items():
            found = config.model_dump(mode="json")
            for part in key.split("."):
                found = found[part]
            assert (found if key != "codec" else {k: found[k] for k in value}) == value
    assert len(seen) == len(tried), "two options look alike"
    (tokens,) = (axis for axis in axes(4, 32) if axis.name == "tokens per head")
    assert [shown(option) for option in tokens.options] == ["8", "16", "all"]


def test_codecs_stand_in_order_of_bytes() -> None:
    spec = MemorySpec(tuple(range(30)), 3, 128, 64, 128, "float32")
    sizes = []
    for codec in CODECS:
        options = {name: value for name, value in codec.items() if name != "kind"}
        sizes.append(construct(load("codecs", codec["kind"]), options, "codec", spec=spec).payload_bytes(80))
    assert sizes == sorted(sizes)


def test_changes_are_checked_and_leave_the_rest() -> None:
    config = changed(BASE, {"recall.memories": 2, "codec": {"kind": "scalar", "bits": 4}})
    assert (config.recall.memories, config.codec.kind, config.codec.options) == (2, "scalar", {"bits": 4})
    assert changed(config, {}) == config
    assert changed(config, {"recall.memories": 5, "codec": {"kind": "product"}}) == BASE
    with pytest.raises(ValueError, match="memories"):
        changed(BASE, {"recall.memories": 0})


def test_an_option_that_the_model_cannot_have_is_a_row_of_the_report() -> None:
    one, none = trial([-1.0, -2.0]), Trial((), (), 0.0, 0.0)
    axis = Axis("positions", ({"memory.positions": "parallel"}, {"memory.positions": "sequential"}))
    kept, less_exact, less_likely = choose([one, none], 0)
    refused = ("", "its keys cannot be moved")
    tried = tuple(map(Tried, axis.options, [one, none], less_exact, less_likely, refused))
    results = SweepResults(one, (Walked(axis, tried, kept),), {"memory.positions": "parallel"}, ((1, one),), {})
    text = sweep_report(results, (), SweepSettings(), BASE).markdown()
    assert "| its keys cannot be moved |" in text
