"""Texts with questions that one of them answers: the corpora of `m3 eval search`."""

import ast
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.world import make_world

_LONGEST = 600
"""Characters of a text: about a reference of 128 tokens."""
_SHORTEST = 40


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts, and for each question the number of the text that answers it."""

    name: str
    texts: Sequence[str]
    questions: Sequence[tuple[str, int]]
    unanswerable: Sequence[str] = ()
    """Questions that none of the texts answers, though they are of the same kind."""


def chosen(seed: int, questions: int, texts: int, files: Sequence[str], *, only_files: bool = False) -> list[Corpus]:
    """Facts, manual, code and the files' corpora. Raises `InputError` as `pairs` does."""
    sizes = (seed, questions, texts)
    own = [] if only_files else [facts(seed, questions), docstrings(*sizes), code(*sizes)]
    return own + [pairs(Path(file), *sizes) for file in files]


def facts(seed: int, questions: int) -> Corpus:
    """Questions about invented facts, whose references come in near misses."""
    size = max(4, questions * 8 // 5)
    world = make_world(seed, references=size, questions=questions, unanswerable=min(questions, size))
    asked = [(one.text, one.reference) for one in world.questions if one.reference is not None]
    return Corpus("facts", world.references, asked, [one.text for one in world.unanswerable])


def docstrings(seed: int, questions: int, texts: int) -> Corpus:
    """The manual of Python's library: the first line of a docstring asks for the rest of it."""
    pairs = [(first, rest) for first, rest, _ in _functions() if rest]
    return _sampled("manual", pairs, seed, questions, texts)


def code(seed: int, questions: int, texts: int) -> Corpus:
    """The source of Python's library: the first line of a docstring asks for the body of its function, without it."""
    return _sampled("code", [(first, body) for first, _, body in _functions() if body], seed, questions, texts)


def pairs(path: Path, seed: int, questions: int, texts: int) -> Corpus:
    """Lines of JSON with a ``text`` each, and a ``question`` if there is one.

    Raises `InputError` for a file that has no questions, or is something else.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            found.append((str(one.get("question") or ""), str(one["text"])))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: lines must be JSON with a text, and a question if there is one: {error}") from error
    return _sampled(path.stem, found, seed, questions, texts)


def _sampled(name: str, pairs: Sequence[tuple[str, str]], seed: int, questions: int, texts: int) -> Corpus:
    """So many of the texts, each once, and of the questions."""
    rng = Random(f"{name} {seed}")
    numbers: dict[str, int] = {}
    some = rng.sample(pairs, min(texts, len(pairs)))
    asked = [(question, numbers.setdefault(text, len(numbers))) for question, text in some]
    first = {question: text for question, text in asked if question}  # one text for each question
    if not first:
        raise InputError(f"{name}: there is no question")
    chosen = rng.sample(sorted(first.items()), min(questions, len(first)))
    others = sorted({question for question, text in pairs if question and text not in numbers} - first.keys())
    return Corpus(name, tuple(numbers), chosen, rng.sample(others, min(questions, len(others))))


@cache
def _functions() -> Sequence[tuple[str, str, str]]:
    """The first line of a docstring, the rest of it, and the function without it, of the library's modules.

    Reading all of them takes some ten seconds.
    """
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                first, _, rest = text.partition("\n")
                body = "\n".join(ast.unparse(one) for one in node.body[1:])
                if len(first) >= _SHORTEST:
                    found.append((first.strip(), _cut(rest), _cut(body)))
    return found


def _cut(text: str) -> str:
    """The beginning of a text; nothing of one that tells too little."""
    text = text.strip()[:_LONGEST]
    return text if len(text) >= 2 * _SHORTEST else ""
