"""Evaluations measure something: with a real model, what is known shows, and what is not does not."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.asking import AnswersResults
from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.lab.evaluation.statistics import mean
from m3runtime.lab.evaluation.world import make_world

pytestmark = [pytest.mark.real_model, pytest.mark.long]

SETTINGS = FactsSettings(
    seed=6, references=12, questions=8, unanswerable=0, ask="statements", max_new_tokens=6, timed=0
)


@pytest.fixture(scope="module")
def results(real_model: tuple[Adapter, Config], tmp_path_factory: pytest.TempPathFactory) -> AnswersResults:
    adapter, config = real_model
    run = FactsRun(config, SETTINGS, tmp_path_factory.mktemp("facts"))
    return run.run(adapter, modes=("none", "memory", "memory-oracle"))


def log_probs(results: AnswersResults, mode: str) -> list[float]:
    return [fmean(results.answers[mode][item.key]["log_probs"]) for item in results.items]  # type: ignore[index]


def test_a_bank_with_the_answers_beats_one_without(
    real_model: tuple[Adapter, Config], results: AnswersResults, tmp_path: Path
) -> None:
    adapter, config = real_model
    assert all(item.right in [match.id for match in item.recalled] for item in results.items), "always recalled"
    # The same questions, over a bank of another world: of the same kinds of things, and none of the answers.
    without = FactsRun(config, SETTINGS, tmp_path)
    other = make_world(9, references=8, questions=8, unanswerable=0)
    strangers = [replace(question, reference=0) for question in without.world.questions]
    without.world = replace(other, questions=tuple(strangers))
    ignorant = without.run(adapter, modes=("memory",))
    pairs = zip(log_probs(results, "memory"), log_probs(ignorant, "memory"), strict=True)
    gained = mean([known - unknown for known, unknown in pairs])
    assert gained.low > 0.5, gained
    knew, guessed = (
        fmean(run.answers["memory"][item.key]["right"] for item in run.items) for run in (results, ignorant)
    )
    assert knew > guessed + 0.2, (knew, guessed)


def test_shuffled_answers_score_like_chance(results: AnswersResults) -> None:
    right = [results.answers["memory"][item.key]["right"] for item in results.items]
    assert fmean(right) > 0.4, right
    answers = [item.question.answers for item in results.items]
    for shift in range(1, len(answers)):
        shuffled = [
            is_right(results.answers["memory"][item.key]["text"], answers[(row + shift) % len(answers)])
            for row, item in enumerate(results.items)
        ]
        assert sum(shuffled) <= 2, (shift, shuffled)


def test_the_right_memory_alone_is_no_worse_than_what_is_recalled(results: AnswersResults) -> None:
    pairs = zip(log_probs(results, "memory-oracle"), log_probs(results, "memory"), strict=True)
    assert mean([oracle - recalled for oracle, recalled in pairs]).high > -0.01  # alike where the others hardly weigh
    assert fmean(log_probs(results, "memory")) > fmean(log_probs(results, "none")) + 1
