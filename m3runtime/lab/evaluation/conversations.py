"""Conversations about a world of invented facts, and how often each way to ask finds the right reference.

A conversation asks for one entity by its name, then goes on about it: by a pronoun, by an ellipsis ("And the colour?"),
and by a pronoun again; then it changes to another entity by name, and goes on about that one.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.condensing import condensed
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.lab.evaluation.corpora import Corpus, pairs
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import mean
from m3runtime.lab.evaluation.world import Entity, make_clusters, put, tell
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.bm25.index import Bm25Index
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.naming import Naming
from m3runtime.retrieval.query import Query
from m3runtime.retrieval.retriever import Retriever
from m3runtime.writing.writer import OnProgress

KINDS = ("name", "pronoun", "ellipsis", "pronoun again", "change", "pronoun after it")
ANYTHING = {
    "pronoun": "What else is known about it?",
    "ellipsis": "And an example?",
    "pronoun again": "Why is it called that?",
    "pronoun after it": "What is it used for?",
}
"""Follow-ups about whatever a text is about."""
FOLLOW_UPS = ("pronoun", "ellipsis", "pronoun again", "pronoun after it")


@dataclass(frozen=True, slots=True)
class ConversationSettings:
    """The settings of `evaluate_conversations`."""

    seed: int = 0
    references: int = 320
    """Texts that are searched."""
    conversations: int = 100
    k: int = 5
    pairs: str = ""
    """A file of `m3runtime.lab.evaluation.corpora.pairs` to talk about in place of a world."""
    weights: tuple[float, ...] = (0.0, 0.4, 0.8, 1.2)
    """Values of ``recall.turn_weight`` to try; 0 asks by the last message alone."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of the user, and the reference that answers it."""

    kind: str
    text: str
    reference: int


def make_conversations(seed: int, references: int, count: int) -> tuple[Sequence[str], Sequence[Sequence[Turn]]]:
    """References of a world, and conversations about them, at most one for each. Equal for equal arguments."""
    rng = Random(f"conversations {seed}")
    entities = [one for cluster in make_clusters(references, rng) for one in cluster.members]
    rng.shuffle(entities)
    texts = [tell(one, rng) for one in entities]
    order = rng.sample(range(len(entities)), len(entities))
    pairs = zip(order, order[1:] + order[:1], strict=True)
    return texts, [_conversation(entities, *pair, rng) for pair, _ in zip(pairs, range(count), strict=False)]


def _conversation(entities: Sequence[Entity], first: int, second: int, rng: Random) -> Sequence[Turn]:
    turns = []
    for number, kinds in ((first, KINDS[:4]), (second, KINDS[4:])):
        entity = entities[number]
        relations = rng.sample(list(entity.values), len(entity.values))
        for kind, place in zip(kinds, range(len(kinds)), strict=True):
            relation = relations[place % len(relations)]
            if kind == "ellipsis":
                text = f"And the {relation.name}?"
            else:
                name = entity.pronoun if "pronoun" in kind else entity.full_name
                text = put(rng.choice(relation.questions), entity, name)
            turns.append(Turn(kind, text, number))
    return turns


def conversations_about(corpus: Corpus, count: int) -> Sequence[Sequence[Turn]]:
    """Conversations that begin with a question of a corpus, change to another one, and follow up with `ANYTHING`."""
    following = zip(corpus.questions, [*corpus.questions[1:], *corpus.questions[:1]], strict=True)
    return [
        [
            Turn(kind, ANYTHING.get(kind, text), number)
            for (text, number), kinds in ((first, KINDS[:4]), (second, KINDS[4:]))
            for kind in kinds
        ]
        for (first, second), _ in zip(following, range(count), strict=False)
    ]


def evaluate_conversations(config: Config, settings: ConversationSettings, progress: OnProgress) -> Report:
    """Ask each message of conversations by each weight, over references that no bank holds.

    With ``recall.condense`` the configured model writes each message anew, and is loaded for that; else none is.
    """
    embedder = assembly.open_embedder(config)
    try:
        found = ask_all(config, embedder, settings, progress)
        fingerprint = embedder.fingerprint
    finally:
        embedder.close()
    followed = {weight: [hit for kind in FOLLOW_UPS for hit in kinds[kind]] for weight, kinds in found.items()}
    rows = [(weight, mean(followed[weight]), *(mean(kinds[kind]) for kind in KINDS)) for weight, kinds in found.items()]
    return Report(
        title="Conversations",
        command="m3 eval conversations",
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints={"embedder": fingerprint},
        summary=tuple(
            f"turn weight {weight}: the right memory is among {settings.k} in {mean(hits)} of follow-ups"
            for weight, hits in followed.items()
        ),
        tables=(
            Table(
                f"The right memory among {settings.k}",
                ("turn weight", "follow-ups", *KINDS),
                tuple(rows),
                "Follow-ups are all but the messages that name the entity.",
            ),
        ),
        plots=(),
        results={str(weight): kinds for weight, kinds in found.items()},
    )


def ask_all(
    config: Config, embedder: Embedder, settings: ConversationSettings, progress: OnProgress
) -> Mapping[float, Mapping[str, list[float]]]:
    """For each weight and kind of message 1.0 for each whose reference was found, else 0.0."""
    if settings.pairs:
        corpus = pairs(Path(settings.pairs), settings.seed, settings.conversations, settings.references)
        texts, conversations = corpus.texts, conversations_about(corpus, settings.conversations)
    else:
        texts, conversations = make_conversations(settings.seed, settings.references, settings.conversations)
    index, ids = assembly.make_index(config, embedder.dim), as_ids(range(len(texts)))
    index.add(ids, embedder.embed_references(texts))
    lexical = None
    if config.recall.search != "dense":
        lexical = Bm25Index()
        lexical.add(ids, texts)
    messages = _messages(config, conversations, progress)
    retriever = Retriever(embedder, index, lexical, alone=config.recall.search == "lexical", memories=settings.k)
    if config.recall.names_weight:
        retriever.naming = Naming(
            lambda chosen: {id: Reference(texts[id], 0) for id in chosen}, config.recall.names_weight
        )
    found: dict[float, dict[str, list[float]]] = {weight: {kind: [] for kind in KINDS} for weight in settings.weights}
    for number, turns in enumerate(conversations, 1):
        for place, turn in enumerate(turns):
            message = messages[number - 1][place]
            for weight in settings.weights:
                query = Query.following(message.query or turn.text, message.context, weight)
                (matches,) = retriever.search([query])
                found[weight][turn.kind].append(float(turn.reference in {match.id for match in matches}))
        progress("Asking", number, len(conversations))
    return found


def _messages(
    config: Config, conversations: Sequence[Sequence[Turn]], progress: OnProgress
) -> Sequence[Sequence[Prompt]]:
    """Each message with those before it; with ``recall.condense`` as the model writes it."""
    found = [
        [Prompt("", turn.text, tuple(one.text for one in reversed(turns[:place]))) for place, turn in enumerate(turns)]
        for turns in conversations
    ]
    if not config.recall.condense:
        return found
    with closing(assembly.open_adapter(config)) as adapter:
        written = []
        for number, prompts in enumerate(found, 1):
            written.append(condensed(adapter, prompts))
            progress("Condensing", number, len(found))
    return written
