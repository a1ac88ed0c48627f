"""Requests that cannot be served end alone, with a reason; tenants never read each other's memories."""

import logging
import os
from typing import Any

import pytest

from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm

log = logging.getLogger(__name__)

TENANTS = int(os.environ.get("M3_TENANTS", "40"))
"""Pairs of equal questions with different memories."""


@pytest.fixture(autouse=True)
def goes_on(both: Both) -> Any:
    """Whatever a test did, the engine lives, and the next request is answered as before."""
    ask = Ask(both.prompt("What does the harbour lamp burn?"), 8, ((3,),))
    [before] = both.theirs([ask])
    yield
    [after] = both.theirs([ask])
    assert after.tokens == before.tokens
    assert not both.scheduler.requests
    half = both.connector.scheduler
    assert half is not None
    assert not half._readings


def refused(both: Both, ids: list[int], params: dict[str, Any] | None, **sampling: Any) -> str:
    """Why a request is refused, asked beside one that is not."""
    good = Ask(both.prompt("Which colour has the town's gate?"), 8, ((1,),))
    [expected] = both.theirs([good])
    reasons: list[str] = []
    half = both.connector.scheduler
    assert half is not None
    finished = half.finished

    def noted(request: Any) -> Any:
        found = finished(request)
        if found and "error" in found["m3"]:
            reasons.append(found["m3"]["error"])
        return found

    half.finished = noted  # type: ignore[method-assign] # vLLM drops what an error says
    try:
        names = [both.submit(ids, 8, params, **sampling), both.submit(both.ids(good), 8, {"m3": good.wish})]
        bad, fine = both.wait(names)
    finally:
        half.finished = finished  # type: ignore[method-assign]
    assert bad.error
    assert not fine.error
    assert fine.tokens == expected.tokens
    [reason] = reasons
    return reason


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"ids": [3, 999_999]}, "no memory 999999"),
        ({"ids": [-1]}, "ids"),
        ({"ids": "3"}, "ids"),
        ({"ids": [3], "log_weights": [1.0]}, "between -80 and 0"),
        ({"ids": [3], "log_weights": []}, "a number for each"),
        ({"memory": 3}, "memory"),
        ({"ids": list(range(30))}, "tokens, and there are"),
        ("all", "m3"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(both: Both, params: Any, said: str) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"))
    assert said in refused(both, both.ids(ask), {"m3": params})


@pytest.mark.parametrize("change", ["none", "one more", "one less", "only the head", "of another length"])
def test_heads_that_are_none(both: Both, change: str) -> None:
    head, text = both.head.ids, both.ids(Ask(both.prompt("What does the harbour lamp burn?")))[len(both.head) :]
    ids = {
        "none": text,
        "one more": [*head, both.head.placeholder, *text],
        "one less": [*head[:-1], *text],
        "only the head": head,
        "of another length": [*head[:40], *text],
    }[change]
    assert "begins with" in refused(both, ids, {"m3": {}})


def test_placeholders_alone_are_never_read_as_text(both: Both) -> None:
    text = both.ids(Ask(both.prompt("What does the harbour lamp burn?")))[len(both.head) :]
    assert "begins with" in refused(both, [*both.head.ids[:-1], *text], None)
    [got] = both.wait([both.submit([*both.head.ids, *text], 8, None, logprobs=1)])  # and by themselves ask for a recall
    assert not got.error
    assert got.m3["reads"][0]["memories"]


def test_prompt_log_probs_are_refused_by_name(both: Both) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"))
    assert "prompt_logprobs" in refused(both, both.ids(ask), {"m3": {"ids": [3]}}, prompt_logprobs=1)


def test_a_single_token_with_a_wish(both: Both) -> None:
    name = both.submit([5], 8, {"m3": {}})
    [got] = both.wait([name])
    assert got.error


def test_a_request_without_memories_is_the_model_as_it_is(both: Both) -> None:
    ids = both.adapter._prompt_ids([both.prompt("The capital of France is")], sink=False)[0]
    [got] = both.wait([both.submit(ids, 12, None)])
    [own] = both.adapter.generate([both.prompt("The capital of France is")], None, both.runtime.config.generate)
    assert got.tokens[: len(own.tokens)] == own.tokens[:12]


def test_several_answers_of_one_request_have_slots_of_their_own(both: Both) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"), 70)
    one, other = both.theirs([ask, ask])
    assert one.tokens == other.tokens
    ids = both.ids(ask)
    name = both.submit(ids, 70, {"m3": ask.wish}, n=2, temperature=1.0, seed=1)
    while name not in both.done:
        both.step()
    both.done.pop(name)


def test_cancelled_at_every_place(both: Both) -> None:
    ask = Ask(both.prompt("Tell me all that you know of the town."), 140)
    for steps in (0, 1, 2, 30, 64, 65, 66):
        name = both.submit(both.ids(ask), 140, {"m3": ask.wish})
        for _ in range(steps):
            both.step()
        both.vllm.abort_request([name])
        both.done.pop(name, None)
    half = both.connector.scheduler
    assert half is not None
    assert not half._readings


def test_two_hundred_at_once(both: Both) -> None:
    asks = [Ask(both.prompt("What does the harbour lamp burn?"), 4, ((number % 30,),)) for number in range(200)]
    answers = both.theirs(asks)
    by_memory: dict[Any, set[Any]] = {}
    for ask, got in zip(asks, answers, strict=True):
        assert not got.error
        by_memory.setdefault(ask.ids, set()).add(got.tokens)
    assert all(len(found) == 1 for found in by_memory.values())


def test_equal_questions_of_tenants_never_read_each_others_memories(both: Both) -> None:
    """With prefix caching on, with equal salts of their own or none, together and one after the other.

    A pair comes while those before it are under way, each at another token: they meet in all steps of an answer.
    """
    prompt = both.prompt("What does the harbour lamp burn, and which colour has the town's gate?")
    tenants = [Ask(prompt, 10, ((3,),)), Ask(prompt, 10, ((1,),))]
    expected = dict(zip(tenants, (both.theirs([ask])[0] for ask in tenants), strict=True))
    lamp, gate = expected.values()
    assert lamp.log_probs != gate.log_probs
    running: dict[str, Ask] = {}

    def go_on(most: int) -> None:
        while len(running) > most:
            both.step()
            for name in [name for name in running if name in both.done]:
                alone, got = expected[running.pop(name)], both.done.pop(name)
                assert got.tokens == alone.tokens
                for one, other in zip(got.log_probs, alone.log_probs, strict=True):
                    assert max(abs(one[token] - other.get(token, one[token])) for token in one) < 1e-3

    for number in range(TENANTS):
        salt = [None, "a", "b"][number % 3]
        together = [tenants[number % 2], tenants[1 - number % 2], *([tenants[0]] if number % 5 == 0 else [])]
        names = [both.submit(both.ids(ask), 10, {"m3": ask.wish}, logprobs=20, salt=salt) for ask in together]
        running.update(zip(names, together, strict=True))
        for _ in range(number % 4):
            both.step()
        go_on(0 if number % 20 == 0 else 16)
        if number % 100 == 99:
            log.info("%s pairs", number + 1)
    go_on(0)


def test_equal_requests_share_their_blocks_and_private_ones_leave_none(both: Both) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"), 4, ((7,),))
    pool = both.scheduler.kv_cache_manager.block_pool
    assert both.vllm.reset_prefix_cache()
    both.theirs([ask])
    held = len(pool.cached_block_hash_to_block)
    both.theirs([ask])
    assert len(pool.cached_block_hash_to_block) == held
    both.theirs([Ask(ask.prompt, 4)])
    assert len(pool.cached_block_hash_to_block) == held


def test_a_recall_that_fails_fails_its_request_alone(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the embedder fell ill")

    monkeypatch.setattr(both.runtime, "recall", broken)
    assert "internal error" in refused(both, both.ids(ask), {"m3": {}})


def test_damaged_and_forgotten_memories_are_not_read(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"))
    fetch = both.runtime.fetch

    def without_four(ids: Any, dtype: Any) -> Any:
        return {id: part for id, part in fetch(ids, dtype).items() if id != 4}

    monkeypatch.setattr(both.runtime, "fetch", without_four)  # what a runtime does with a block that failed its check
    assert "memory 4 is damaged" in refused(both, both.ids(ask), {"m3": {"ids": [3, 4]}})


@pytest.mark.parametrize("params", [{"m3": {}}, {"m3": {"memory": 3}}])
def test_a_refused_request_ends_none_whose_blocks_it_would_share(both: Both, params: Any) -> None:
    ids = both.adapter._prompt_ids([both.prompt("The town has a harbour, a gate and a wall. " * 10)], sink=False)[0]
    assert len(ids) > 64
    [alone] = both.wait([both.submit(ids, 20, None)])
    running = both.submit(ids, 20, None)
    for _ in range(3):
        both.step()
    bad, fine = both.wait([both.submit(ids, 20, params), running])
    assert bad.error
    assert not fine.error
    assert fine.tokens == alone.tokens
