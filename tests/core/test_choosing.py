"""The choice of a setting, on tables of scores for which the best one is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.lab.evaluation.choosing import (
    MEMORIES,
    Case,
    Pair,
    Setting,
    best,
    choose,
    crossed,
    grid,
    values,
)
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.retriever import passing

FORMER = Setting(5, 0.3, None)


def case(scores: list[float], likelihoods: list[float]) -> Case:
    """Likelihoods of the answer with nothing, the nearest memory, the nearest two..."""
    return Case(tuple(Match(n, score) for n, score in enumerate(scores)), dict(enumerate(likelihoods)))


def pairs(known: list[float], unknown: list[float], count: int = 24, noise: float = 0.0, seed: int = 0) -> list[Pair]:
    """Statements whose own reference scores about 0.8, and those of others about 0.4; likelihoods by memories."""
    drawing, made = np.random.default_rng(seed), []
    for _ in range(count):
        shift = drawing.uniform(-0.05, 0.05)
        right = sorted([0.8 + shift, *(0.4 + shift + drawing.uniform(-0.02, 0.02) for _ in range(7))], reverse=True)
        wrong = sorted((0.4 + shift + drawing.uniform(-0.02, 0.02) for _ in range(8)), reverse=True)
        about = drawing.normal(0, 1)
        made.append(
            Pair(
                case(right, [about + one + drawing.normal(0, noise) for one in known]),
                case(wrong, [about + one + drawing.normal(0, noise) for one in unknown]),
            )
        )
    return made


def chosen(statements: list[Pair], former: Setting = FORMER) -> Setting:
    settings = grid([nearest for pair in statements for nearest in (pair.known.nearest, pair.unknown.nearest)], former)
    nothing = np.array([pair.nothing for pair in statements])
    return settings[choose(settings, values(settings, statements), nothing)]


def test_one_right_memory_and_a_floor_against_misleading_ones() -> None:
    statements = pairs(known=[-5, -1, -2, -2, -2, -2, -2, -2, -2], unknown=[-5, -6, -7, -7, -7, -7, -7, -7, -7])
    found = chosen(statements)
    assert found.memories == 1
    assert found.margin is None
    assert 0.46 < found.min_score <= 0.86
    assert all(found.recalled(pair.known.nearest) == 1 for pair in statements)
    assert not any(found.recalled(pair.unknown.nearest) for pair in statements)


def test_more_memories_where_they_say_more() -> None:
    gains = [-5, -4, -3.5, -3, -2.5, -2, -1.8, -1.5, -1]
    found = chosen(pairs(known=gains, unknown=gains))
    assert (found.memories, found.margin) == (8, None)
    assert found.min_score < 0.45


def test_a_margin_where_only_the_best_is_good_beside_a_far_better_one() -> None:
    """Alone the right one, but several where none stands out: no number of memories and no floor does both."""
    statements = pairs(known=[-5, -1, -4, -4, -4, -4, -4, -4, -4], unknown=[-5, -4.8, -4.5, -4, -3.5, -3, -2.5, -2, -1])
    found = chosen(statements)
    assert found.memories == 8
    assert found.margin is not None
    assert all(found.recalled(pair.known.nearest) == 1 for pair in statements)


def test_of_memories_that_tell_nothing_more_the_fewer() -> None:
    found = chosen(pairs([-5, -2, -1, -1, -1, -1, -1, -1, -1], [-5, -5, -5, -5, -5, -5, -5, -5, -5], noise=0.05))
    assert found.memories == 2


def test_nothing_is_recalled_where_memories_only_mislead() -> None:
    falling = [-1.0, -2, -3, -4, -5, -6, -7, -8, -9]
    statements = pairs(falling, falling)
    assert not any(chosen(statements).recalled(pair.known.nearest) for pair in statements)


def test_few_noisy_statements_do_not_choose_next_to_nothing() -> None:
    """They can tell nothing from anything; the simplest setting of all would always be taken."""
    statements = pairs([-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1], [-5] * 9, count=8, noise=4.0)
    assert chosen(statements).memories > 1


TABLES = st.integers(8, 14).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(-9, 0), min_size=9, max_size=9), min_size=2 * count, max_size=2 * count),
        st.lists(st.lists(st.floats(-1, 1), max_size=8), min_size=2 * count, max_size=2 * count),
    )
)


@given(TABLES, st.sampled_from([FORMER, Setting(12, -0.5, 0.2), Setting(1, 1.0, 0.0)]))
def test_the_rule_holds_whatever_the_scores(
    tables: tuple[list[list[float]], list[list[float]]], former: Setting
) -> None:
    cases = [
        case(sorted(scores, reverse=True), likelihoods)
        for likelihoods, scores in zip(*tables, strict=True)
    ]  # fmt: skip
    statements = [Pair(*both) for both in zip(cases[::2], cases[1::2], strict=True)]
    settings = grid([one.nearest for one in cases], former)
    assert former in settings
    table, nothing = values(settings, statements), np.array([pair.nothing for pair in statements])
    taken, top = choose(settings, table, nothing), best(table)
    means = table.mean(1)
    assert means[top] == means.max()
    if all(match.score < 1 for one in cases for match in one.nearest):
        assert means[top] >= nothing.mean() - 1e-9, "the highest floor recalls nothing"
    assert settings[taken].memories <= settings[top].memories
    gain = max(0, means[top] - nothing.mean())
    assert means[taken] >= means[top] - 0.02 * gain - 1e-9
    assert choose(settings, table, nothing) == taken
    fair = crossed(settings, table, nothing)
    assert fair.mean() <= means[top] + 1e-9, "what others chose is no better than the best for all"
    for column, value in enumerate(fair):
        assert value in table[:, column]


@given(st.lists(st.floats(-1, 1), max_size=9), st.integers(1, 9), st.floats(-1, 1), st.none() | st.floats(0, 1))
def test_a_setting_recalls_what_a_retriever_would(
    scores: list[float], memories: int, floor: float, margin: float | None
) -> None:
    matches = [Match(n, score) for n, score in enumerate(sorted(scores, reverse=True))]
    count = Setting(memories, floor, margin).recalled(matches)
    assert matches[:count] == passing(matches[:memories], min_score=floor, margin=margin)


def test_the_grid_is_simplest_first_and_fits_the_scores() -> None:
    scores = [[one, one - 0.01, one - 0.02] for one in np.linspace(0.92, 0.96, 30)]  # an embedder that finds all near
    settings = grid([[Match(n, one) for n, one in enumerate(row)] for row in scores], FORMER)
    assert [one.memories for one in settings] == sorted(one.memories for one in settings)
    assert {one.memories for one in settings} == set(MEMORIES)
    assert len({one.min_score for one in settings if 0.89 < one.min_score < 0.97}) > 20
    margins = {one.margin for one in settings} - {None}
    assert margins
    assert all(0 < margin < 0.05 for margin in margins if margin)
    assert all(settings.index(one) < len(settings) / 2 for one in settings if one.memories == 1)
    assert len(set(settings)) == len(settings)


def test_nothing_found_gives_a_grid_nevertheless() -> None:
    settings = grid([[], []], FORMER)
    assert FORMER in settings
    statement = Pair(case([], [-1.0]), case([], [-2.0]))
    assert values(settings, [statement]) == pytest.approx(-1.5)


def test_each_statement_is_judged_by_the_others() -> None:
    settings = [Setting(1, 0.0, None), Setting(2, 0.0, None)]
    table = np.zeros((2, 8))
    table[0, 0] = 100.0  # one statement alone likes the first
    table[1, 1:] = 1.0
    nothing = np.full(8, -1.0)
    assert best(table) == 0
    assert crossed(settings, table, nothing)[0] == 0.0
