"""`Detokenizer`: the text of tokens that come one by one, decoded from the last few of them."""

from collections.abc import Callable, Sequence

_TAIL = 16
"""From so many tokens on, a tail is cut,"""
_KEPT = 4
"""before so many tokens, and so many before those go on as their context. No character has more bytes."""


class Detokenizer:
    """Gives after each token the text that decoding all tokens at once would give.

    A token's text depends on its neighbours: characters are spread over tokens, and spaces belong to beginnings. So a
    tail of tokens is decoded together, whose first ones are context: their text is known already. The tail is cut where
    the text afterwards is the same with and without what is cut off. For a byte-level tokenizer that is so at every
    place that no character spans, and the tail has no more tokens than about `_TAIL` and those that, in a row, have no
    text (special tokens). Of other tokenizers, those that decode a byte anew because of a much later one are not
    followed: no text that is shown while it is written could.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tail: list[int] = []
        self._context = 0  # characters of the tail's context
        self._settled = ""  # the text up to the context's end

    def add(self, token: int) -> str:
        """The text of all tokens so far. Its end may still change, where half a character is."""
        self._tail.append(token)
        text = self._decode(self._tail)
        whole = self._settled + text[self._context :]
        if len(self._tail) >= _TAIL:
            self._cut(text, whole)
        return whole

    def _cut(self, text: str, whole: str) -> None:
        place = len(self._tail) - _KEPT
        before = self._decode(self._tail[:place])
        tail = self._tail[place - _KEPT :]
        context = len(self._decode(tail[:_KEPT]))
        after = self._decode(tail)[context:]
        # Nothing after it would prove nothing: half a character, for one, is the same text with and without its half.
        if after and before + after == text:
            self._settled = whole[: len(whole) - len(after)]
            self._tail, self._context = tail, context
