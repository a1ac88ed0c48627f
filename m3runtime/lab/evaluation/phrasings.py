"""`kinds`: the kinds of invented entities, their relations and their phrasings, read from ``phrasings.txt``."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Relation:
    """A property that every entity of a kind has, with sentences that state it and ask for it."""

    name: str
    values: str  # see m3runtime.lab.evaluation.vocabulary.draw_value
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    statement: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of entity; its names are templates with slots."""

    name: str
    full_name: str
    short_name: str
    pronoun: str
    varying: tuple[str, ...]  # near misses differ in one of these slots
    openings: tuple[str, ...]
    relations: tuple[Relation, ...]


@cache
def kinds() -> tuple[Kind, ...]:
    """Every kind, in the order of the file."""
    text = files("m3runtime.lab.evaluation").joinpath("phrasings.txt").read_text("utf-8")
    lines = "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))
    return tuple(_kind(block) for block in f"\n{lines}".split("\nkind ")[1:])


def _kind(block: str) -> Kind:
    head, *relations = block.split("\nrelation ")
    header, *openings = (line.strip() for line in head.splitlines())
    name, full_name, short_name, pronoun, varying = header.split(" | ")
    return Kind(
        name, full_name, short_name, pronoun, tuple(varying.split()), tuple(openings), tuple(map(_relation, relations))
    )


def _relation(block: str) -> Relation:
    header, *lines, statement = (line.strip() for line in block.splitlines())
    name, values = header.split(" | ")
    facts = tuple(line for line in lines if not line.startswith("? "))
    questions = tuple(line.removeprefix("? ") for line in lines if line.startswith("? "))
    return Relation(name, values, facts, questions, statement.removeprefix("= "))
