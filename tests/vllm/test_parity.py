"""Memories in vLLM's slots give the answers of our own adapter, token for token, in float32."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from m3runtime.adapters.answers import Answer
from m3runtime.lab.evaluation.judging import is_right
from tests.vllm.both import Ask, Both, Got

pytestmark = pytest.mark.vllm

QUESTIONS = [
    json.loads(line) for line in (Path(__file__).parents[2] / "docs/demo/questions.jsonl").read_text().splitlines()
]
log = logging.getLogger(__name__)
EXACT = 1e-3
"""Largest difference of log-probabilities where no weight stands in."""


def best(both: Both, question: str, k: int) -> tuple[int, ...]:
    (matches,) = both.runtime.search([question], k)
    return tuple(match.id for match in matches)


def named(both: Both, count: int, k: int, tokens: int = 12) -> list[Ask]:
    texts = [one["question"] for one in QUESTIONS[:count]]
    return [Ask(both.prompt(text), tokens, (best(both, text, k),)) for text in texts]


def check(both: Both, asks: Sequence[Ask], answers: Sequence[Got], within: float = EXACT) -> list[Answer]:
    ours = both.ours(asks)
    for own, got in zip(ours, answers, strict=True):
        assert got.tokens == own.tokens, (got.text, own.text)
        assert both.difference(own, got) < within
    log.info("largest difference: %.1e", max(map(both.difference, ours, answers)))
    return ours


def test_the_bank_is_in_the_product_codec(both: Both) -> None:
    manifest = both.runtime.bank.manifest
    assert (manifest.codec_kind, manifest.planned) == ("product", None)


def test_one_memory_one_by_one(both: Both) -> None:
    asks = named(both, 8, 1)
    check(both, asks, [both.theirs([ask])[0] for ask in asks])


def test_eight_at_once_each_with_its_own_memory(both: Both) -> None:
    asks = named(both, 8, 1)
    check(both, asks, both.theirs(asks))


def test_thirty_two_at_once(both: Both) -> None:
    asks = [ask for k in (1, 3) for ask in named(both, 16, k)]
    check(both, asks, both.theirs(asks))


def test_five_memories(both: Both) -> None:
    asks = named(both, 8, 5)
    check(both, asks, both.theirs(asks))


def test_no_memory_leaves_all_slots_empty(both: Both) -> None:
    asks = [Ask(both.prompt("Which colour has the town's gate?"), 24, ((),))]
    check(both, asks, both.theirs(asks))


def test_refreshed_after_64_and_128_tokens(both: Both) -> None:
    one, two, three = best(both, "the harbour lamp", 1), best(both, "the market hall", 3), best(both, "bees", 2)
    prompt = both.prompt("Tell me all that you know of the town.")
    asks = [Ask(prompt, 150, (one, two, three)), Ask(prompt, 140, (three, one)), Ask(prompt, 150, (two,))]
    answers = both.theirs(asks)
    check(both, asks, answers)
    assert [[m["id"] for m in read["memories"]] for read in answers[0].m3["reads"]] == [[*one], [*two], [*three]]
    assert [read["tokens"] for read in answers[0].m3["reads"]] == [0, 64, 128]


def test_the_same_memories_again_change_nothing(both: Both) -> None:
    ids = best(both, "the harbour lamp", 2)
    prompt = both.prompt("Tell me all that you know of the town.")
    again, never = both.theirs([Ask(prompt, 80, (ids, ids)), Ask(prompt, 80, (ids,), more=(("refresh", False),))])
    assert again.tokens == never.tokens


def test_five_weighted_memories_answer_the_demo(both: Both) -> None:
    """Recalled by vLLM's scheduler itself, weighted by score; the answers to all questions are our adapter's."""
    asks = [Ask(both.prompt(one["question"], "reference"), 24) for one in QUESTIONS]
    answers = both.theirs(asks)
    ours = both.ours(asks)

    def first_line(text: str) -> str:
        return text.partition("\n")[0]

    same = sum(first_line(got.text) == first_line(own.text) for got, own in zip(answers, ours, strict=True))
    right = sum(is_right(first_line(got.text), one["answers"]) for got, one in zip(answers, QUESTIONS, strict=True))
    exact = sum(is_right(first_line(own.text), one["answers"]) for own, one in zip(ours, QUESTIONS, strict=True))
    alike = [(own, got) for own, got in zip(ours, answers, strict=True) if own.tokens == got.tokens]
    worst, of_ten = (max(both.difference(own, got, best) for own, got in alike) for best in (1, 10))
    log.info(
        "equal answers %s, all tokens equal %s, right %s (ours %s), of %s", same, len(alike), right, exact, len(ours)
    )
    log.info("largest difference: %.3f of the likeliest token, %.3f of ten", worst, of_ten)
    for own, got in zip(ours, answers, strict=True):
        assert [[m["id"] for m in read["memories"]] for read in got.m3["reads"]] == [list(c.ids) for c in own.chunks]
    assert same == len(QUESTIONS)
    assert right >= 20
    assert worst < 0.5  # of the likeliest token: a direction is constant to a few hundredths of a weight


def test_a_recall_is_refreshed_as_ours_is(both: Both) -> None:
    """Of a single memory, whose weight is one: weights by bias are not exact enough for hundreds of tokens."""
    asks = [Ask(both.prompt(one["question"]), 140, more=(("memories", 1),)) for one in QUESTIONS[:4]]
    answers = both.theirs(asks)
    for own, got in zip(check(both, asks, answers), answers, strict=True):
        assert [[m["id"] for m in read["memories"]] for read in got.m3["reads"]] == [list(c.ids) for c in own.chunks]
