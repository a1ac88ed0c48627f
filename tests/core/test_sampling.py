"""Laws of the sample that a codec is trained on."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from m3runtime.documents.reference import Reference
from m3runtime.testing.codec_laws import SPEC
from m3runtime.writing.fitting import memory_tokens, sample

TOKENS = 96 * SPEC.tokens


def references(count: int, tokens: int = SPEC.tokens) -> list[Reference]:
    return [Reference(f"Number {number}.", tokens) for number in range(count)]


def numbers(some: list[Reference], tokens: int = TOKENS) -> list[int]:
    return [int(one.text.removeprefix("Number ").removesuffix(".")) for one in sample(some, tokens, SPEC)]


def test_few_references_are_all_in_it() -> None:
    assert sorted(numbers(references(96))) == list(range(96))
    assert sample([], TOKENS, SPEC) == []


def test_it_is_the_same_each_time_and_from_everywhere() -> None:
    found = numbers(references(20 * 96))
    assert len(found) == len(set(found)) == 96
    quarters = Counter(number // (5 * 96) for number in found)
    assert all(96 / 8 < quarters[quarter] < 96 / 2 for quarter in range(4))


@pytest.mark.parametrize("seed", range(3))
def test_it_depends_on_the_set_of_texts_alone(seed: int) -> None:
    drawing = random.Random(seed)
    all_of_them = [replace(one, tokens=drawing.randint(1, SPEC.tokens)) for one in references(500)]
    again = all_of_them + drawing.sample(all_of_them, 100)
    drawing.shuffle(again)
    assert numbers(again) == numbers(all_of_them)


def test_it_has_as_many_tokens_and_no_more_references_than_that_takes() -> None:
    for tokens in (1, 5, SPEC.tokens, 3 * SPEC.tokens):
        found = sample(references(2000, tokens), TOKENS, SPEC)
        assert memory_tokens(found, SPEC) >= TOKENS
        assert memory_tokens(found[:-1], SPEC) < TOKENS


def test_memories_of_fewer_tokens_need_more_references() -> None:
    few = replace(SPEC, tokens=SPEC.tokens // 4)
    assert len(sample(references(20 * 96), TOKENS, few)) == 4 * 96


def test_its_beginning_is_a_sample_too() -> None:
    some = references(2000)
    assert numbers(some)[:10] == numbers(some, 10 * SPEC.tokens)
