"""Statements to complete, made from a bank's own references without a model."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.storage.home import Home

FEWEST = 8
"""Statements below which nothing can be told."""
_LOOKED_AT = 20
"""References that are looked at for each statement wanted, or a large bank without any would be read whole."""
_BATCH = 256

_BEGINNING = 4
"""Fewest words of a prompt."""
_LONGEST = 60
"""Most words of a sentence: what has more is a table, or code."""
_NAMING = 2
"""Words of a prompt that say what it is about: names, numbers and long ones."""
_LONG = 5
_SHORT = 4
"""Letters below which a last word says too little alone (`it`, `him`), in most languages."""
_NAME = 4
"""Most words of a name."""

_PROSE = 0.88
"""Least share of letters, digits and spaces in a sentence: what has fewer is code, or a table."""
_BEFORE_A_BEGINNING = re.compile(r"[.:;!?]")

_SENTENCE_END = re.compile(
    r"(?<=[.!?…؟])[\"'”’»)\]*_]*\s+"
    r"|\n\s*\n"
    r"|\n(?=\s*(?:[-*+•|>#]|\d+[.)])\s)"  # an item of a list, a heading
)
_WORD = re.compile(r"\w+(?:['’.,:/-]\w+)*")


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence of a reference that breaks off before what it tells. ``prompt + answer`` is the sentence so far."""

    reference: int
    prompt: str
    answer: str
    """Begins with a space, if the prompt does not end in the middle of something (a bracket, a quotation)."""

    @property
    def text(self) -> str:
        """What the reference says, with single spaces."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class Statements:
    """What was made of a bank."""

    made: tuple[Statement, ...]
    skipped: int
    """References that were looked at and give none: too short, without sentences, without spaces between words."""


def make_statements(home: Home, wanted: int, seed: int = 0) -> Statements:
    """At most ``wanted`` statements, each of another reference, which depend on the bank and the seed alone.

    Raises `InputError` if the bank has not even `FEWEST`.
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
    """A statement of one sentence of a reference, or None if it has none that will do.

    A sentence that tells a number or a name goes before one that does not.
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
    """Whether a reference says what the statement does, in the same words."""
    return statement.text in " ".join(text.split())


def _cut(sentence: str) -> tuple[int, int, bool] | None:
    """Where a sentence's answer begins and ends, and whether it is a number or a name."""
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
    """Whether a word is a number or a name."""
    return _is_number(words[place][0]) or _is_name(sentence, words, place)


def _is_number(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


def _is_name(sentence: str, words: Sequence[re.Match[str]], place: int) -> bool:
    """Whether a word has a capital that no beginning gives it."""
    word = words[place][0]
    if not place or len(word) == 1 or not word[0].isupper():  # `I` is none
        return False
    return not _BEFORE_A_BEGINNING.search(sentence, words[place - 1].end(), words[place].start())


def _whole_name(sentence: str, words: Sequence[re.Match[str]], place: int) -> int:
    """The first word of the name that ends at a place; a number is one word."""
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
