"""Budgets are fitted to scores: heads whose tokens matter more keep more of them, and all together as many."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.lab.evaluation.budgets import LEAST, fitted, held


def scores(lengths: list[int], seed: int) -> list[torch.Tensor]:
    """Scores of three layers with two heads, of which later ones matter more."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.arange(1, 7).view(3, 2, 1) ** 2
    return [torch.rand(3, 2, length, generator=random) ** 4 * weight for length in lengths]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 99))
def test_heads_keep_as_many_tokens_on_average(lengths: list[int], tokens: int, seed: int) -> None:
    some = scores(lengths, seed)
    budgets = fitted(some, tokens, 40)
    assert budgets.shape == (3, 2)
    assert 1 <= int(budgets.min()) <= int(budgets.max()) <= 40
    mean = sum(float(budgets.clamp_max(length).float().mean()) for length in lengths) / len(lengths)
    wanted = sum(min(tokens, length) for length in lengths) / len(lengths)
    assert mean <= wanted + 1e-6 or int(budgets.max()) == 1
    assert mean == pytest.approx(wanted, abs=1.0)


def test_heads_that_matter_keep_more_and_hold_more() -> None:
    some = scores([40, 30, 35, 28], 1)
    budgets = fitted(some, 10, 40)
    assert int(budgets[2, 1]) > 2 * int(budgets[0, 0])
    assert int(budgets.min()) >= int(10 * LEAST) - 1
    even = torch.full_like(budgets, 10)
    assert held(some, budgets) > held(some, even) + 0.02
    assert held(some, torch.full_like(budgets, 40)) == pytest.approx(1)


def test_heads_that_are_alike_keep_as_many() -> None:
    one = torch.rand(1, 1, 50).expand(3, 2, 50)
    assert fitted([one.clone() for _ in range(3)], 12, 128).unique().tolist() == [12]
