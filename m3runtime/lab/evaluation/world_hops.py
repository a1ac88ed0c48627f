"""`make_hops`: questions that take two references of an invented world, such as a device's and its inventor's.

Entities are those of `m3runtime.lab.evaluation.world`. A reference names a person by name alone; what is asked of that
person stands in another reference. Neither reference answers the question by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.world import Entity, make_clusters, put, tell

PERSON = "person"
"""The kind of entity, and the kind of value, that joins two references."""
QUESTIONS_PER_PERSON = 2


@dataclass(frozen=True, slots=True)
class HopQuestion:
    """A question whose answer takes two references."""

    text: str
    answers: tuple[str, ...]
    """Accepted spellings, first the one in the second reference."""
    references: tuple[int, int]
    """The reference that names a person, and that person's own."""


@dataclass(frozen=True, slots=True)
class HopWorld:
    """References, and questions that take two of them each."""

    seed: int
    references: tuple[str, ...]
    questions: tuple[HopQuestion, ...]


def make_hops(seed: int, *, references: int, questions: int) -> HopWorld:
    """The world of a seed; equal for equal seeds and sizes. About one reference in eight is of a person.

    Raises `InputError` if the people are too few for so many questions.
    """
    rng = Random(f"hops {seed}")
    told = [entity for cluster in make_clusters(references, rng) for entity in cluster.members]
    rng.shuffle(told)
    people = [number for number, entity in enumerate(told) if entity.kind.name == PERSON]
    links = list(_links(told, people, rng))
    asked = []
    for turn in range(QUESTIONS_PER_PERSON):
        for thing, role, person in links:
            relation, answers = list(told[person].values.items())[turn]
            text = put(rng.choice(relation.questions), told[person], f"the {role} of {told[thing].full_name}")
            asked.append(HopQuestion(text, answers, (thing, person)))
    if len(asked) < questions:
        raise InputError(f"questions: {references} references give {len(asked)} questions of two references at most")
    return HopWorld(seed, tuple(tell(entity, rng) for entity in told), tuple(asked[:questions]))


def _links(told: list[Entity], people: list[int], rng: Random) -> Iterator[tuple[int, str, int]]:
    """Have each person named by a thing of its own: the thing, the person's role in it, and the person."""
    named = [
        (number, relation)
        for number, entity in enumerate(told)
        if entity.kind.name != PERSON
        for relation in entity.values
        if relation.values == PERSON
    ]
    for person, (thing, relation) in zip(people, rng.sample(named, len(named)), strict=False):
        told[thing].values[relation] = (told[person].full_name,)
        yield thing, relation.name, person
