"""Tensor parallel: three workers, each with one of three KV heads, that read the bank themselves."""

from typing import Any

import pytest

from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"tensor_parallel_size": 3, "slots": 253, "distributed_executor_backend": "mp"}


def test_three_workers(both: Both) -> None:
    ids = [tuple(match.id for match in one) for one in both.runtime.search(["the harbour lamp", "bees", "the gate"], 2)]
    asks = [Ask(both.prompt("Tell me all that you know of the town."), 80, (one, ids[0])) for one in ids]
    answers = both.theirs(asks)
    for own, got in zip(both.ours(asks), answers, strict=True):
        assert got.tokens == own.tokens
        assert both.difference(own, got) < 1e-3
