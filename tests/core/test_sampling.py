"""Laws of the sample that a codec is trained on."""

from collections import Counter
from contextlib import closing
from dataclasses import replace

from m3runtime.documents.reading import Document
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.testing.codec_laws import SPEC
from m3runtime.writing.fitting import SAMPLE, sample


def spool(count: int) -> ReferenceSpool:
    documents = (Document("a", f"Number {number}.") for number in range(count))
    return ReferenceSpool(documents, Splitter(len, max_tokens=100), whole=True)


def numbers(count: int, tokens: int = SPEC.tokens) -> list[int]:
    with closing(spool(count)) as references:
        texts = sample(references, replace(SPEC, tokens=tokens))
    return [int(text.removeprefix("Number ").removesuffix(".")) for text in texts]


def test_few_references_are_all_in_it() -> None:
    assert numbers(SAMPLE) == list(range(SAMPLE))


def test_it_is_the_same_each_time_in_order_and_from_everywhere() -> None:
    found = numbers(20 * SAMPLE)
    assert found == numbers(20 * SAMPLE) == sorted(set(found))
    assert len(found) == SAMPLE
    quarters = Counter(number // (5 * SAMPLE) for number in found)
    assert all(SAMPLE / 8 < quarters[quarter] < SAMPLE / 2 for quarter in range(4))


def test_memories_of_fewer_tokens_need_more_references() -> None:
    assert len(numbers(20 * SAMPLE, SPEC.tokens // 4)) == 4 * SAMPLE
