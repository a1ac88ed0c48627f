"""Under torch.compile: the same answers."""

from typing import Any

import pytest

from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"enforce_eager": False, "slots": 253}


def test_compiled_as_eager(both: Both) -> None:
    ids = [tuple(match.id for match in one) for one in both.runtime.search(["the harbour lamp", "bees", "the gate"], 2)]
    asks = [Ask(both.prompt("Tell me all that you know of the town."), 80, (one, ids[0])) for one in ids]
    answers = both.theirs(asks)
    for own, got in zip(both.ours(asks), answers, strict=True):
        assert got.tokens == own.tokens
        assert both.difference(own, got) < 1e-3
