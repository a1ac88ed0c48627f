"""`make_statements`: statements to complete, made from the bank's own references without a model."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.storage.home import Home

FEWEST = 8
"""Fewest statements that a result can be based on."""
_LOOKED_AT = 20
"""Most references to look at for each wanted statement, so that a large bank is not read whole."""
_BATCH = 256

_BEGINNING = 4
"""Fewest words of a prompt."""
_LONGEST = 60
"""Most words of a sentence; a longer one is a table or code."""
_NAMING = 2
"""Fewest words of a prompt that tell its subject: names, numbers and long words."""
_LONG = 5
_SHORT = 4
"""Fewest letters of a last word that is an answer alone; shorter ones (`it`, `him`) tell too little."""
_NAME = 4
"""Most words of a name."""

_PROSE = 0.88
"""Least share of letters, digits and spaces in a sentence; below it, the sentence is code or a table."""
_BEFORE_A_BEGINNING = re.compile(r"[.:;!?]")

_SENTENCE_END = re.compile(
    r"(?<=[.!?…؟])[\"'”’»)\]*_]*\s+"
    r"|\n\s*\n"
    r"|\n(?=\s*(?:[-*+•|>#]|\d+[.)])\s)"  # an item of a list, a heading
)
_WORD = re.compile(r"\w+(?:['’.,:/-]\w+)*")


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence of a reference that is cut before its answer: ``prompt + answer`` is the text of the reference."""

    reference: int
    prompt: str
    answer: str
    """Begins with a space, unless the prompt ends inside a bracket or a quotation."""

    @property
    def text(self) -> str:
        """The text of the statement, with single spaces."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements that were made from a bank."""

    made: tuple[Statement, ...]
    skipped: int
    """References without a statement: too short, without sentences, or without spaces between words."""


def make_statements(home: Home, wanted: int, seed: int = 0) -> Statements:
    """At most ``wanted`` statements, each of another reference, determined by the bank and the seed.

    Raises `InputError` if the bank gives fewer than `FEWEST`.
    """
    ids = np.random.default_rng(seed).permutation(np.setdiff1d(home.ids(), home.cold()))[: wanted * _LOOKED_AT]
    made: dict[str, Statement] = {}
    looked_at = 0
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        for id, reference in zip(some.tolist(), home.references(some), strict=True):
            if len(made) < wanted:
                looked_at += 1
                statement = reference and make_statement(id, reference.text, seed)
                if statement:
                    made.setdefault(statement.text, statement)
    if len(made) < min(FEWEST, wanted):
        raise InputError(
            f"{looked_at} references of the bank give {len(made)} statements to complete, and at least {FEWEST} are "
            f"needed: sentences of {_BEGINNING + 1} words or more; write more references into it"
        )
    return Statements(tuple(made.values()), looked_at - len(made))


def make_statement(id: int, text: str, seed: int = 0) -> Statement | None:
    """A statement from one sentence of a reference, or None if no sentence is suitable.

    Sentences that end in a number or a name are preferred.
    """
    telling: list[Statement] = []
    others: list[Statement] = []
    for sentence in sentences(text):
        if cut := _cut(sentence):
            start, end, tells = cut
            (telling if tells else others).append(Statement(id, sentence[:start], sentence[start:end]))
    choices = telling or others
    # By id, so that a reference gives the same statement whatever else is asked for.
    return random.Random(f"{seed}/{id}").choice(choices) if choices else None


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, with single spaces between words."""
    for piece in _SENTENCE_END.split(text):
        if sentence := " ".join(piece.split()):
            yield sentence


def holds(text: str, statement: Statement) -> bool:
    """True if a reference contains the statement, in the same words."""
    return statement.text in " ".join(text.split())


def _cut(sentence: str) -> tuple[int, int, bool] | None:
    """Start and end of a sentence's answer, and True if the answer is a number or a name; None if unsuitable."""
    words = list(_WORD.finditer(sentence))
    if not _BEGINNING < len(words) <= _LONGEST or _prose(sentence) < _PROSE:
        return None
    places = [place for place in range(_BEGINNING, len(words)) if _tells(sentence, words, place)]
    if places:
        first, last = _whole_name(sentence, words, places[-1]), places[-1]
    else:
        last = len(words) - 1
        first = last if len(words[last][0]) >= _SHORT else max(_BEGINNING, last - 1)
    start, end = words[first].start(), words[last].end()
    answer = sentence[start:end]
    start -= sentence[start - 1 : start] == " "
    prompt = sentence[:start]
    about = {
        word[0].casefold()
        for place, word in enumerate(words[:first])
        if len(word[0]) >= _LONG or _tells(sentence, words, place)
    }
    if len(about) < _NAMING or is_right(prompt, [answer]):  # an answer in the prompt needs no memory
        return None
    return start, end, bool(places)


def _prose(sentence: str) -> float:
    return sum(letter.isalnum() or letter == " " for letter in sentence) / len(sentence)


def _tells(sentence: str, words: Sequence[re.Match[str]], place: int) -> bool:
    """True if a word is a number or a name."""
    return _is_number(words[place][0]) or _is_name(sentence, words, place)


def _is_number(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


def _is_name(sentence: str, words: Sequence[re.Match[str]], place: int) -> bool:
    """True if a word has a capital letter that is not due to the beginning of a sentence."""
    word = words[place][0]
    if not place or len(word) == 1 or not word[0].isupper():  # `I` is none
        return False
    return not _BEFORE_A_BEGINNING.search(sentence, words[place - 1].end(), words[place].start())


def _whole_name(sentence: str, words: Sequence[re.Match[str]], place: int) -> int:
    """The place of the first word of the name that ends at ``place``; a number is one word."""
    first = place
    if _is_number(words[place][0]):
        return first
    while (
        first > max(_BEGINNING, place + 1 - _NAME)
        and _is_name(sentence, words, first - 1)
        and sentence[words[first - 1].end() : words[first].start()] == " "
    ):
        first -= 1
    return first
