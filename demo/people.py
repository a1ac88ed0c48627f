"""People who do not exist, in words that do not exist, and texts about them: what `make train-small` trains on."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

RELATIONS = 24
"""Verbs (to wear, own, fear and so on) in words that nobody uses."""
TOLD = 3
"""Facts of each person."""
PEOPLE, HELD_OUT = 3_200, 300
"""People of whom training texts tell, and people of whom the model is asked."""
COPYING, TELLING = 32_000, 24_000
"""Documents of each kind."""
STATEMENTS = 12
"""Statements in a document that repeats itself."""
TOLD_OF = 6
"""People in each other document."""


@dataclass(frozen=True)
class Person:
    """A person and the facts about them."""

    name: str
    facts: tuple[tuple[str, str], ...]

    def statements(self) -> list[str]:
        return [f"{self.name} {relation} {value} ." for relation, value in self.facts]

    def reference(self) -> str:
        return " ".join(self.statements())


def words(count: int, rng: Random, taken: set[str]) -> list[str]:
    """``count`` words that nobody uses."""
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found


class World:
    """People, and texts about some of them."""

    def __init__(self, seed: int = 0) -> None:
        rng, taken = Random(seed), set[str]()
        self.first, self.last, self.values, self.relations = (
            words(count, rng, taken) for count in (60, 60, 50, RELATIONS)
        )
        names = [f"{first} {last}" for first in self.first for last in self.last]
        self.people = [
            Person(name, tuple((relation, rng.choice(self.values)) for relation in rng.sample(self.relations, TOLD)))
            for name in rng.sample(names, PEOPLE + HELD_OUT)
        ]
        self.known, self.held_out = self.people[:PEOPLE], self.people[PEOPLE:]
        self._asked = {person.name for person in self.held_out}
        self._doing = {
            relation: [person for person in self.known if relation in dict(person.facts)] for relation in self.relations
        }
        kinds = rng.choices((self._rote, self._several, self._alike), (4, 3, 3), k=COPYING)
        self.copying = [kind(rng) for kind in kinds]
        self.telling = [self._telling(rng) for _ in range(TELLING)]

    def _rote(self, rng: Random) -> str:
        """A few meaningless words, repeated. All but the first round can be predicted: copying begins with these."""
        some = rng.choices(self.first + self.last + self.values + self.relations, k=rng.randint(4, 20))
        return " ".join((some * 5 * STATEMENTS)[: 5 * STATEMENTS])

    def _several(self, rng: Random) -> str:
        """Statements about a few people, repeated in other orders."""
        return self._again(rng, [self._invented(rng).statements()[0] for _ in range(rng.choice((2, 3, 4)))])

    def _alike(self, rng: Random) -> str:
        """The same relations of one person or a few: name and relation together determine the value."""
        people, relations = rng.choice(((1, 3), (2, 2), (2, 3), (3, 1), (3, 2)))
        told = rng.sample(self.relations, relations)
        return self._again(rng, [line for _ in range(people) for line in self._invented(rng, told).statements()])

    def _invented(self, rng: Random, relations: Sequence[str] = ()) -> Person:
        """A person of this text alone."""
        facts = ((relation, rng.choice(self.values)) for relation in relations or rng.sample(self.relations, 1))
        return Person(self._name(rng), tuple(facts))

    def _name(self, rng: Random) -> str:
        """A name that no held-out person has."""
        while (name := f"{rng.choice(self.first)} {rng.choice(self.last)}") in self._asked:
            pass
        return name

    @staticmethod
    def _again(rng: Random, statements: Sequence[str]) -> str:
        """All statements in a random order, then in others."""
        said: list[str] = []
        while len(said) < STATEMENTS:
            said += rng.sample(statements, len(statements))
        return " ".join(said[:STATEMENTS])

    def _telling(self, rng: Random) -> str:
        """Statements about six people, mostly of one relation, some with one name: only memory tells who does what."""
        relation = rng.choice(self.relations)
        doing = self._doing[relation]
        one = rng.choice(doing)
        namesakes = [person for person in doing if set(person.name.split()) & set(one.name.split())]
        some = rng.sample(namesakes, min(len(namesakes), TOLD_OF // 2))  # as what is nearest to a question will be
        names = {person.name for person in some}
        some += rng.sample([person for person in doing if person.name not in names], TOLD_OF - len(some))
        told = []
        for person in rng.sample(some, TOLD_OF):
            chosen = relation if rng.random() < 0.7 else rng.choice(person.facts)[0]
            told += [line for line, (name, _) in zip(person.statements(), person.facts, strict=True) if name == chosen]
        return " ".join(told)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each word."""
        special = ["<s>", "</s>", "<unk>", "Reference:", "."]
        vocabulary = [*special, *self.relations, *self.first, *self.last, *self.values]
        tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
