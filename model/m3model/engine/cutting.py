"""Cutting a text into pieces of equally many tokens."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from m3runtime.errors import InputError


def cut(tokenizer: Any, text: str, tokens: int) -> list[str]:
    """A text in pieces of ``tokens`` tokens; see `Adapter.cut`.

    With a fast tokenizer they are the tokens of the whole text.
    """
    if tokens < 1:
        raise InputError(f"a piece has at least 1 token, not {tokens}")
    ends = _ends(tokenizer, text, tokens) if tokenizer.is_fast else _ends_by_counting(tokenizer, text, tokens)
    pieces, start = [], 0
    for end in ends:
        if end > start:  # a token may have no character of its own
            pieces.append(text[start:end])
            start = end
    return pieces


def _ends(tokenizer: Any, text: str, tokens: int) -> Iterator[int]:
    """The ends of pieces, by the spans of the whole text's tokens."""
    spans = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    # A piece ends where a token does, not where the next one begins: many tokenizers tell a token's span without the
    # space that it begins with. Between two tokens of the same character no piece can end.
    may_end = [0, *(left[1] <= right[0] for left, right in pairwise(spans)), len(text) > 0]
    at = 0
    while at + tokens < len(spans):
        last = at + tokens
        while last > at and not may_end[last]:
            last -= 1
        if last == at:
            last += tokens
            while last < len(spans) and not may_end[last]:
                last += 1
        if last == len(spans):
            break
        yield spans[last - 1][1]
        at = last
    if text:
        yield len(text)


def _ends_by_counting(tokenizer: Any, text: str, tokens: int) -> Iterator[int]:
    """The ends of pieces, for tokenizers that tell no spans: each is as long as its own tokens allow."""

    def fits(start: int, end: int) -> bool:
        return len(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]) <= tokens

    start = 0
    while start < len(text):
        step = tokens
        while start + step < len(text) and fits(start, start + step):
            step *= 2
        low, high = start + 1, min(start + step, len(text))
        if not fits(start, high):
            high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(start, middle) else (low, middle - 1)
        yield low
        start = low
