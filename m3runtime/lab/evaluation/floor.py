"""`evaluate_floor`: how well the score of the nearest text tells whether any text answers a question."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.evaluation import corpora
from m3runtime.lab.evaluation.corpora import Corpus
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import mean
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.writing.writer import OnProgress

LOST = 0.03
"""The share of answerable questions that a floor may decline."""
_OWN = 100
"""Questions that are made of the texts themselves."""
_OWN_WORDS = 10
_BATCH = 64
_WORD = re.compile(r"\w[\w'.-]*")

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FloorSettings:
    """The settings of `evaluate_floor`."""

    seed: int = 0
    questions: int = 150
    """Most questions of each corpus that a text answers, and as many that none answers."""
    texts: int = 400
    """Most texts of each corpus; of the facts, 8 for 5 questions."""
    pairs: tuple[str, ...] = ()
    """Further corpora: files of `corpora.pairs`."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """The scores of the nearest text of a corpus."""

    answerable: Scores
    unanswerable: Scores
    own: Scores
    """Of questions that are some words of a text."""

    @property
    def area(self) -> float:
        """The chance that an answerable question scores higher than an unanswerable one; 0.5 tells nothing."""
        higher = self.answerable[:, None] > self.unanswerable
        equal = self.answerable[:, None] == self.unanswerable
        return float(higher.mean() + equal.mean() / 2)

    def floors(self, configured: float) -> dict[str, float]:
        """The floor of the configuration, that of the texts' own words, and the best that labels could give."""
        return {
            "recall.min_score": configured,
            "by its own texts": float(np.quantile(self.own, LOST)),
            "by labelled questions": float(np.quantile(self.answerable, LOST)),
        }


def evaluate_floor(config: Config, settings: FloorSettings, progress: OnProgress) -> Report:
    """Ask corpora that no bank holds what their texts answer, and what none of them answers. No model is loaded.

    Raises `InputError` for a corpus of which all questions are answered.
    """
    tried = corpora.chosen(settings.seed, settings.questions, settings.texts, settings.pairs)
    for corpus in tried:
        if not corpus.unanswerable:
            raise InputError(
                f"{corpus.name}: no question is left that none of {len(corpus.texts)} texts answers; set --texts"
            )
    embedder = assembly.open_embedder(config)
    try:
        found = {corpus.name: nearest(embedder, corpus, settings.seed, progress) for corpus in tried}
        fingerprint = embedder.fingerprint
    finally:
        embedder.close()
    return Report(
        title="Score floor",
        command="m3 eval floor",
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints={"embedder": fingerprint},
        summary=tuple(f"{name}: the area under the curve is {one.area:.3f}" for name, one in found.items()),
        tables=(_table(found, config.recall.min_score),),
        plots=(),
        results={name: {kind: scores.tolist() for kind, scores in asdict(one).items()} for name, one in found.items()},
    )


def nearest(embedder: Embedder, corpus: Corpus, seed: int, progress: OnProgress) -> Nearest:
    """The score of the nearest text for each question of a corpus."""
    vectors = []
    for start in range(0, len(corpus.texts), _BATCH):
        vectors.append(embedder.embed_references(corpus.texts[start : start + _BATCH]))
        progress(f"Embedding {corpus.name}", min(start + _BATCH, len(corpus.texts)), len(corpus.texts))
    texts = np.concatenate(vectors)
    asked = [question for question, _ in corpus.questions]
    own = own_questions(corpus.texts, seed)
    return Nearest(*(_best(embedder, texts, questions) for questions in (asked, corpus.unanswerable, own)))


def own_questions(texts: Sequence[str], seed: int) -> list[str]:
    """Questions that need no labels: ten words in a row of a text each."""
    rng, made = Random(f"own {seed}"), []
    for text in rng.sample(texts, min(_OWN, len(texts))):
        words = _WORD.findall(text)
        start = rng.randrange(max(1, len(words) - _OWN_WORDS))
        made.append(" ".join(words[start : start + _OWN_WORDS]))
    return made


def _best(embedder: Embedder, texts: Embeddings, questions: Sequence[str]) -> Scores:
    return (embedder.embed_queries(questions) @ texts.T).max(axis=1)  # type: ignore[no-any-return]


def _table(found: dict[str, Nearest], configured: float) -> Table:
    rows = [
        (
            name,
            f"{one.area:.3f}",
            kind,
            f"{floor:.2f}",
            mean([float(score < floor) for score in one.answerable]),
            mean([float(score < floor) for score in one.unanswerable]),
        )
        for name, one in found.items()
        for kind, floor in one.floors(configured).items()
    ]
    columns = ("corpus", "area", "floor", "score", "answerable, declined", "unanswerable, declined")
    note = f"The last two floors are to decline {LOST:.0%} of their own questions, and of answerable ones."
    return Table("Questions whose nearest text scores below a floor", columns, tuple(rows), note)
