"""`names`: the words of a question that name something."""

import re

_SENTENCE_END = re.compile(r"(?<=[.:!?])\s+")
_WORD = re.compile(r"\w+")


def names(text: str) -> set[str]:
    """The words with a digit or a capital, lower-cased; a capital does not count at the beginning of a sentence."""
    return {
        word.lower()
        for sentence in _SENTENCE_END.split(text.strip())
        for place, word in enumerate(_WORD.findall(sentence))
        if any(letter.isdigit() or (place and letter.isupper()) for letter in word)
    }
