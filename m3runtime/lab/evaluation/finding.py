"""`evaluate_search`: how often each kind of search finds the text that answers a question, and how long it takes."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass

import numpy as np

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.lab.evaluation import corpora
from m3runtime.lab.evaluation.corpora import Corpus
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean
from m3runtime.lab.results import Spread
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.bm25.index import Bm25Index
from m3runtime.retrieval.duplicates import Duplicates
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.naming import Naming
from m3runtime.retrieval.reranker import Reranker
from m3runtime.retrieval.reranking import Reranking
from m3runtime.retrieval.retriever import Retriever
from m3runtime.writing.writer import OnProgress

KINDS = ("dense", "lexical", "hybrid")
RERANKED = {"dense": "dense, reranked", "hybrid": "hybrid, reranked"}
NAMES = "dense, names"
NAMES_WEIGHT = 0.2
"""``recall.names_weight`` of `NAMES`."""
COPIED, DISTINCT = "dense, copies", "dense, copies once"
_BATCH = 64


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The settings of `evaluate_search`."""

    seed: int = 0
    questions: int = 300
    """Most questions of each corpus."""
    texts: int = 2000
    """Most texts of each corpus; of the facts, 8 for 5 questions."""
    k: int = 5
    """Texts that one search may give."""
    pairs: tuple[str, ...] = ()
    """Further corpora: files of `corpora.pairs`."""
    copies: int = 0
    """Also search corpora in which each text stands so many times more, with copies each a match, and once."""
    only_pairs: bool = False
    """Leave out facts, manual and code."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one kind of search over one corpus."""

    ranks: tuple[int, ...]
    """For each question the place of the right text among those found, from 1 on; 0: it is not among them."""
    seconds: Spread
    """The time of one search, without the embedding of the question."""

    def recall(self, k: int) -> Estimate:
        """The share of questions whose text is among the first ``k``."""
        return mean(self.hits(k))

    def hits(self, k: int) -> list[float]:
        """1.0 for each question whose text is among the first ``k``."""
        return [float(0 < rank <= k) for rank in self.ranks]


def evaluate_search(config: Config, settings: SearchSettings, progress: OnProgress) -> Report:
    """Search corpora that no bank holds, by the configured embedder, index and reranker. No model is loaded."""
    sizes = (settings.seed, settings.questions, settings.texts)
    tried = corpora.chosen(*sizes, settings.pairs, only_files=settings.only_pairs)
    with ExitStack() as opened:
        embedder = assembly.open_embedder(config)
        opened.callback(embedder.close)
        reranker = assembly.open_reranker(config, assembly.device(config))
        if reranker is not None:
            opened.callback(reranker.close)
        found = {corpus.name: search_corpus(config, embedder, reranker, corpus, settings, progress) for corpus in tried}
        fingerprint = embedder.fingerprint
    return Report(
        title="Search",
        command="m3 eval search",
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints={"embedder": fingerprint},
        summary=tuple(_summary(corpus, found[corpus.name], settings.k) for corpus in tried),
        tables=(_table(tried, found, settings.k),),
        plots=(),
        results={name: {kind: one.ranks for kind, one in kinds.items()} for name, kinds in found.items()},
        measured={name: {kind: one.seconds for kind, one in kinds.items()} for name, kinds in found.items()},
    )


def search_corpus(
    config: Config,
    embedder: Embedder,
    reranker: Reranker | None,
    corpus: Corpus,
    settings: SearchSettings,
    progress: OnProgress,
) -> Mapping[str, Found]:
    """Ask all questions of a corpus by `KINDS` and those of `RERANKED`, and over copies by `COPIED` and `DISTINCT`."""
    index, lexical, size, k = assembly.make_index(config, embedder.dim), Bm25Index(), len(corpus.texts), settings.k
    copied = assembly.make_index(config, embedder.dim)
    for start in range(0, size, _BATCH):
        some = corpus.texts[start : start + _BATCH]
        ids, vectors = as_ids(range(start, start + len(some))), embedder.embed_references(some)
        index.add(ids, vectors)
        lexical.add(ids, some)
        for number in range(settings.copies + 1 if settings.copies else 0):
            copied.add(ids + as_ids([number * size]), vectors)
        progress(f"Embedding {corpus.name}", start + len(some), size)

    def references(ids: Sequence[int]) -> dict[int, Reference]:
        return {id: Reference(corpus.texts[id % size], 0) for id in ids}

    retrievers = {
        "dense": Retriever(embedder, index, memories=k),
        "lexical": Retriever(embedder, index, lexical, alone=True, memories=k),
        "hybrid": Retriever(embedder, index, lexical, memories=k),
        NAMES: Retriever(embedder, index, memories=k),
    }
    retrievers[NAMES].naming = Naming(references, NAMES_WEIGHT)
    if reranker is not None and config.recall.reranker is not None:
        for kind, name in RERANKED.items():
            retrievers[name] = copy(retrievers[kind])
            retrievers[name].reranking = Reranking(reranker, references, config.recall.reranker.candidates)
    if settings.copies:
        retrievers |= {kind: Retriever(embedder, copied, memories=k) for kind in (COPIED, DISTINCT)}
    for kind, retriever in retrievers.items():
        if kind != COPIED:  # as in a runtime
            retriever.duplicates = Duplicates(references)
    return {kind: _ask(retriever, corpus) for kind, retriever in retrievers.items()}


def _ask(retriever: Retriever, corpus: Corpus) -> Found:
    ranks, seconds = [], []
    plain = copy(retriever)
    plain.reranking = None
    for question, right in corpus.questions:
        plain.search([question])  # embeds it, and the next search does not
        began = time.perf_counter()
        (matches,) = retriever.search([question])
        seconds.append(time.perf_counter() - began)
        given = [{id % len(corpus.texts) for id in (match.id, *match.stands_for)} for match in matches]
        places = [place for place, ids in enumerate(given, 1) if right in ids]
        ranks.append(places[0] if places else 0)
    return Found(tuple(ranks), Spread.of(seconds))


def _summary(corpus: Corpus, found: Mapping[str, Found], k: int) -> str:
    parts = [name for name in KINDS if name != "hybrid"]
    better = max(parts, key=lambda name: np.mean(found[name].hits(k)))
    gain = difference(found["hybrid"].hits(k), found[better].hits(k))
    told = [f"{corpus.name}: hybrid less the better of its parts ({better}) is {gain} in recall@{k}"]
    for kind, name in RERANKED.items():
        if name in found:
            first, among = (difference(found[name].hits(n), found[kind].hits(n)) for n in (1, k))
            told.append(f"{name} less {kind} is {among} in recall@{k} and {first} in recall@1")
    return "; ".join(told)


def _table(tried: Sequence[Corpus], found: Mapping[str, Mapping[str, Found]], k: int) -> Table:
    rows = [
        (
            corpus.name,
            f"{len(corpus.texts):,}",
            len(corpus.questions),
            kind,
            one.recall(k),
            one.recall(1),
            one.seconds.show_ms(),
        )
        for corpus in tried
        for kind, one in found[corpus.name].items()
    ]
    columns = ("corpus", "texts", "questions", "search", f"recall@{k}", "recall@1", "ms, median (quartiles)")
    note = "Milliseconds are of one search, without the embedding of the question."
    return Table("The right text among those found", columns, tuple(rows), note)
