"""Chunked prefill and preemption: a cache that is too small for all, and few tokens of prompt in a step."""

import logging
from typing import Any

import pytest

from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm

log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"slots": 253, "num_gpu_blocks_override": 36, "max_num_batched_tokens": 64, "max_model_len": 512}


def test_chunked_and_preempted_requests_have_the_answers_that_they_have_alone(both: Both) -> None:
    texts = ["the harbour lamp", "the market hall", "bees", "the gate", "the bell", "the ferry", "the wall", "an owl"]
    prompt = both.prompt("Tell me, in many words and without any haste, all that you know of the town. " * 3)
    ids = [tuple(match.id for match in found) for found in both.runtime.search(texts, 2)]
    asks = [Ask(prompt, 100, (one, other) if number % 2 else (one,)) for number, (one, other) in enumerate(
        zip(ids, ids[1:] + ids[:1], strict=True))]  # fmt: skip
    preempted = 0
    finish = both.scheduler._preempt_request

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return finish(*arguments, **named)

    both.scheduler._preempt_request = counted
    answers = both.theirs(asks)
    assert preempted
    log.info("preempted %s times", preempted)
    for own, got in zip(both.ours(asks), answers, strict=True):
        assert not got.error
        assert got.tokens == own.tokens
        assert both.difference(own, got) < 1e-3
