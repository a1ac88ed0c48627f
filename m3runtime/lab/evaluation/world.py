"""`make_world`: a seeded world of invented facts, with references that state them and questions about them.

No fact is true, so a model that answers a question has read its reference. Entities come in clusters of near misses,
such as two dams of one name at different places, which state the same relations with different values: an answer shows
that the right reference was found and read, rather than one that resembles it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice, zip_longest
from random import Random

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.phrasings import Kind, Relation, kinds
from m3runtime.lab.evaluation.vocabulary import SLOTS, WOMEN, Names, draw_value

MOST_REFERENCES = 10_000  # the vocabulary has names for a few times more
QUESTIONS_PER_REFERENCE = 2
PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her"), "it": ("it", "it", "its")}

Spellings = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one entity of a world."""

    text: str
    statement: str  # the same to complete: the answer follows after one space
    answers: Spellings  # accepted spellings, first the one in the reference; empty if no reference holds the answer
    reference: int | None  # the index of the one reference that holds the answer
    wrong: tuple[str, ...]  # values that references state of the same relation for near misses
    kind: str  # the relation, such as "device.inventor"


@dataclass(frozen=True, slots=True)
class World:
    """References, questions that they answer, and questions that they do not."""

    seed: int
    references: tuple[str, ...]
    questions: tuple[Question, ...]
    unanswerable: tuple[Question, ...]
    names: tuple[str, ...] = field(default=(), repr=False)  # of the entity that each reference is about


@dataclass(frozen=True, slots=True)
class Entity:
    """An invented person, place or thing."""

    kind: Kind
    full_name: str
    short_name: str
    pronoun: str
    values: dict[Relation, Spellings]  # what its reference states


@dataclass(frozen=True, slots=True)
class Cluster:
    """Entities that are near misses of each other, and one more that no reference mentions."""

    kind: Kind
    members: tuple[Entity, ...]
    absent: Entity

    def wrong(self, relation: Relation, *, about: Entity) -> tuple[str, ...]:
        """The values of a relation that references state for the near misses of an entity."""
        return tuple(each.values[relation][0] for each in self.members if each is not about and relation in each.values)


_Told = tuple[Cluster, Entity]


def make_world(
    seed: int, *, references: int = 320, questions: int = 200, unanswerable: int = 50, named: bool = True
) -> World:
    """The world of a seed; equal for equal seeds and sizes, on every machine.

    Each reference answers at most two questions and gives rise to at most one unanswerable question. Half of the latter
    ask for what the reference of an entity does not tell, half are about an entity that has no reference.

    Without ``named`` a reference says he, she or it of its entity from the first word, as below a heading that has the
    name. Facts and questions are the same either way.

    Raises:
        InputError: a size is too small, too large, or more questions are asked for than the references can serve.
    """
    _check_size("references", references, 1, MOST_REFERENCES, "as far as the invented names go")
    _check_size("questions", questions, 1, QUESTIONS_PER_REFERENCE * references, "two for each reference")
    _check_size("unanswerable", unanswerable, 0, references, "one for each reference")
    rng = Random(f"world {seed}")  # a string, as Random takes -1 for 1
    clusters = make_clusters(references, rng)
    told = [(cluster, entity) for cluster in clusters for entity in cluster.members]
    rng.shuffle(told)
    return World(
        seed,
        tuple(tell(entity, rng, named=named) for _, entity in told),
        tuple(_ask_answerable(told, questions, rng)),
        tuple(_ask_unanswerable(told, unanswerable, rng)),
        tuple(entity.full_name for _, entity in told),
    )


def _check_size(name: str, size: int, least: int, most: int, why: str) -> None:
    if not least <= size <= most:
        raise InputError(f"{name}: must be between {least} and {most} ({why}), not {size}")


def make_clusters(references: int, rng: Random) -> list[Cluster]:
    """So many entities, in clusters of near misses."""
    names = Names(rng)
    clusters = []
    for kind in cycle(rng.sample(kinds(), len(kinds()))):
        size = min(rng.randint(2, 4), references)
        if references - size == 1:  # nobody is left without a near miss
            size += 1 if size < 4 else -1
        clusters.append(_make_cluster(kind, size, names, rng))
        references -= size
        if not references:
            break
    return clusters


def _make_cluster(kind: Kind, size: int, names: Names, rng: Random) -> Cluster:
    shared = {slot: _fill(slot, 1, names, rng)[0] for slot in re.findall(r"{(\w+)}", kind.full_name)}
    varying = rng.choice(kind.varying)
    slots = [shared | {varying: filling} for filling in _fill(varying, size + 1, names, rng)]
    # Each value once among near misses, whatever its relation: a wrong answer then tells where it was read.
    taken: list[Spellings] = [(kind.full_name.format_map(each),) for each in slots]
    relations = rng.sample(kind.relations, len(kind.relations))
    core, others = relations[:QUESTIONS_PER_REFERENCE], relations[QUESTIONS_PER_REFERENCE:]
    members = []
    for each in slots[:size]:
        values = {}
        for relation in [*core, *rng.sample(others, rng.randint(1, 3))]:
            value = draw_value(relation.values, rng, names)
            while any(_overlap(value, other) for other in taken):
                value = draw_value(relation.values, rng, names)
            taken.append(value)
            values[relation] = value
        members.append(_make_entity(kind, each, values))
    return Cluster(kind, tuple(members), _make_entity(kind, slots[size], {}))


def _make_entity(kind: Kind, slots: dict[str, str], values: dict[Relation, Spellings]) -> Entity:
    pronoun = "she" if slots.get("given") in WOMEN else kind.pronoun
    return Entity(kind, kind.full_name.format_map(slots), kind.short_name.format_map(slots), pronoun, values)


def _fill(slot: str, count: int, names: Names, rng: Random) -> list[str]:
    return rng.sample(SLOTS[slot], count) if slot in SLOTS else [names.draw(slot) for _ in range(count)]


def _overlap(some: Spellings, others: Spellings) -> bool:
    """True if a spelling contains one of the others as whole words, or is contained in one."""
    some, others = tuple(map(_words, some)), tuple(map(_words, others))
    return any(one in other or other in one for one in some for other in others)


def _words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def tell(entity: Entity, rng: Random, *, named: bool = True) -> str:
    """The reference of an entity: its full name first, then its short name or an unambiguous pronoun.

    Pronouns alone if it is not ``named``.
    """
    full, short = (entity.full_name, entity.short_name) if named else (entity.pronoun, entity.pronoun)
    sentences = []
    clear = False  # whether a pronoun could only mean the entity
    if len(entity.values) < 5:
        opening = rng.choice(entity.kind.openings)
        sentences.append(put(opening, entity, full))
        clear = opening.startswith("{S}")
    for relation, value in rng.sample(list(entity.values.items()), len(entity.values)):
        if sentences:
            fact = rng.choice(relation.facts)
            name = entity.pronoun if clear and rng.random() < 0.7 else short
        else:
            fact = rng.choice([each for each in relation.facts if each.startswith("{S}")])
            name = full
        sentences.append(put(fact, entity, name, value[0]))
        clear = fact.startswith(("{S}", "{P}")) and relation.values != "person"
    return " ".join(sentences)


def put(template: str, entity: Entity, name: str, value: str = "") -> str:
    """A sentence about an entity, with the given name or pronoun."""
    subject, object, possessive = PRONOUNS.get(name, (name, name, f"{name}'s"))
    fields = {"s": subject, "o": object, "p": possessive, "S": _capital(subject), "P": _capital(possessive)}
    return template.format_map(fields | {"short": entity.short_name, "v": value})


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _ask_answerable(told: Sequence[_Told], count: int, rng: Random) -> Iterator[Question]:
    asked: Counter[str] = Counter()
    done: set[tuple[int, Relation]] = set()
    rounds = chain.from_iterable(_evenly(told, rng) for _ in range(QUESTIONS_PER_REFERENCE))
    for index in islice(rounds, count):
        cluster, entity = told[index]
        choice = [each for each in entity.values if (index, each) not in done]
        confusable = [each for each in choice if cluster.wrong(each, about=entity)]
        relation = _rarest(confusable or choice, entity.kind, asked, rng)
        done.add((index, relation))
        yield _ask(cluster, entity, relation, rng, reference=index)


def _ask_unanswerable(told: Sequence[_Told], count: int, rng: Random) -> Iterator[Question]:
    asked: Counter[str] = Counter()
    done: set[tuple[str, Relation]] = set()
    of_the_absent = set(rng.sample(range(count), count // 2))
    for number, index in enumerate(_evenly(told, rng)[:count]):
        cluster, entity = told[index]
        if number in of_the_absent:
            entity = cluster.absent
        unstated = [each for each in entity.kind.relations if each not in entity.values]
        choice = [each for each in unstated if (entity.full_name, each) not in done]
        confusable = [each for each in choice if cluster.wrong(each, about=entity)]
        relation = _rarest(confusable or choice, entity.kind, asked, rng)
        done.add((entity.full_name, relation))
        yield _ask(cluster, entity, relation, rng, reference=None)


def _evenly(told: Sequence[_Told], rng: Random) -> list[int]:
    """Every reference once, in random order; the kinds alternate."""
    by_kind: dict[str, list[int]] = {}
    for index in rng.sample(range(len(told)), len(told)):
        by_kind.setdefault(told[index][1].kind.name, []).append(index)
    return [index for turn in zip_longest(*by_kind.values()) for index in turn if index is not None]


def _rarest(relations: Sequence[Relation], kind: Kind, asked: Counter[str], rng: Random) -> Relation:
    """Draw one of the relations that were asked about least often so far, and count it."""
    relation = min(relations, key=lambda each: (asked[f"{kind.name}.{each.name}"], rng.random()))
    asked[f"{kind.name}.{relation.name}"] += 1
    return relation


def _ask(cluster: Cluster, entity: Entity, relation: Relation, rng: Random, *, reference: int | None) -> Question:
    return Question(
        text=put(rng.choice(relation.questions), entity, entity.full_name),
        statement=put(relation.statement, entity, entity.full_name),
        answers=entity.values.get(relation, ()),
        reference=reference,
        wrong=cluster.wrong(relation, about=entity),
        kind=f"{entity.kind.name}.{relation.name}",
    )
