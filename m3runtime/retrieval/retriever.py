"""`Retriever`: an embedder and an index together turn texts into scored ids."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Self

import numpy as np

from m3runtime.config.where import Where
from m3runtime.errors import ConfigError
from m3runtime.memory.block import Ids
from m3runtime.retrieval.derived import Derived
from m3runtime.retrieval.duplicates import Duplicates
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.retrieval.fusion import fused
from m3runtime.retrieval.index import Index
from m3runtime.retrieval.lexical import LexicalIndex
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.naming import CANDIDATES, Naming
from m3runtime.retrieval.query import Query, Text, turn_weights
from m3runtime.retrieval.recent import Recent
from m3runtime.retrieval.reranking import Reranking
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction

Timed = Callable[[str], AbstractContextManager[object]]
"""Is told that the block is the phase ``embed`` or ``search``."""

Members = Callable[[Where], Ids]
"""The ids that have a place which meets these conditions."""

_RECENT = 64
_DEPTH = 50
"""Least number of ids of each of two searches whose ranks are joined."""
_CANDIDATES = 2
"""Times as many ids are searched for as are wanted, because some may say the same; and again as many, and so on."""
_MOST_CANDIDATES = 64
"""Times as many that are searched for at last. A text that stands oftener takes further places."""


class Retriever:
    """Chooses memories for texts: embeds, searches, applies the score floor and margin.

    ``margin`` leaves out memories whose score lies more than that below the best one's: fewer, better memories beat
    more. The embeddings of the last calls are cached, so a hinted text is not embedded again. Thread-safe.
    """

    def __init__(
        self,
        embedder: Embedder,
        index: Index,
        lexical: LexicalIndex | None = None,
        *,
        alone: bool = False,
        memories: int,
        min_score: float = -1.0,
        margin: float | None = None,
    ) -> None:
        """With a ``lexical`` index both are searched and joined by ranks; if it is ``alone``, only its hits are."""
        self.embedder = embedder
        self.index = index
        self.lexical = lexical
        self.alone = alone
        self.memories = memories
        self.min_score = min_score
        self.margin = margin
        self.members: Members | None = None
        """Finds the ids that meet conditions; without it no search has any."""
        self.duplicates: Duplicates | None = None
        """Joins matches that say the same; without it each is a match of its own."""
        self.naming: Naming | None = None
        """Lowers the scores of matches that lack a question's names; without it scores are those of the search."""
        self.reranking: Reranking | None = None
        """Orders the first matches; without it they stay in the order of the search."""
        # By all texts of a call: the last bits of an embedding may depend on the other texts of its batch.
        self._recent = Recent[tuple[str, ...], Embeddings](_RECENT)

    @property
    def indexes(self) -> list[Derived]:
        """All indexes that it searches, that of the embeddings first."""
        return [self.index] if self.lexical is None else [self.index, self.lexical]

    def unlimited(self, k: int) -> Self:
        """The same search for ``k`` ids, whatever their scores."""
        other = copy(self)
        other.memories, other.min_score, other.margin, other.duplicates = k, -1.0, None, None
        return other

    def clear(self) -> None:
        """Forget the embeddings of recent calls, so that a text is embedded anew."""
        self._recent = Recent(_RECENT)

    def search(
        self,
        texts: Sequence[Text],
        k: int | None = None,
        timed: Timed = nullcontext,
        restrictions: Sequence[Restriction] | None = None,
    ) -> list[list[Match]]:
        """Matches of each text, best first; at most ``k`` (default ``memories``). A blank text has none.

        ``restrictions`` has one for each text. Its conditions are applied in the search, never after it.
        """
        wanted = self.memories if k is None else k
        limits = restrictions or [UNRESTRICTED] * len(texts)
        queries = [Query.of(text) for text in texts]
        asked = [i for i, query in enumerate(queries) if query.text.strip()]
        matches: list[list[Match]] = [[] for _ in texts]
        if not asked or not wanted or not len(self.index):
            return matches
        wording = tuple(queries[i].text for i in asked)
        with timed("embed"):
            vectors = self._recent(wording, lambda: self.embedder.embed_queries(wording))
            # Each is embedded alone: a message is when it is asked, and again only after many others.
            contexts = [
                [self._recent((text,), partial(self.embedder.embed_queries, (text,))) for text in queries[i].context]
                for i in asked
            ]
        with timed("search"):
            for where in dict.fromkeys(limits[i].where for i in asked):
                rows = [row for row, i in enumerate(asked) if limits[i].where == where]
                found = self._matches(
                    [queries[asked[row]] for row in rows],
                    vectors[rows],
                    [contexts[row] for row in rows],
                    [limits[asked[row]] for row in rows],
                    wanted,
                )
                for row, chosen in zip(rows, found, strict=True):
                    matches[asked[row]] = chosen
        return matches

    def _matches(
        self,
        queries: Sequence[Query],
        vectors: Embeddings,
        contexts: Sequence[Sequence[Embeddings]],
        limits: Sequence[Restriction],
        wanted: int,
    ) -> list[list[Match]]:
        """The matches of queries whose limits have the same conditions."""
        matches: list[list[Match]] = [[] for _ in queries]
        depth = wanted if self.duplicates is None else _CANDIDATES * wanted
        depth = depth if self.reranking is None else max(depth, self.reranking.candidates)
        depth = depth if self.naming is None else max(depth, CANDIDATES)
        rows = list(range(len(queries)))
        while rows:
            given = [queries[row] for row in rows], vectors[rows], [contexts[row] for row in rows]
            lacking = []
            for row, found in zip(rows, self._found(*given, depth, limits[0].where), strict=True):
                ordered = found if self.naming is None else self.naming.scored(queries[row].text, found)
                if self.reranking is not None:
                    ordered = self.reranking.ordered(queries[row].question, ordered)
                matches[row], is_all = self._chosen(ordered, limits[row], wanted, depth)
                if not is_all and depth < _MOST_CANDIDATES * wanted:
                    lacking.append(row)
            rows, depth = lacking, 2 * depth
        return matches

    def _with_context(
        self, vectors: Embeddings, queries: Sequence[Query], contexts: Sequence[Sequence[Embeddings]], among: Ids | None
    ) -> Embeddings:
        """The sum of each query's vector and those of its context by their weights, of length 1."""
        if not any(contexts):
            return vectors
        vectors = vectors.copy()
        for row, (query, context) in enumerate(zip(queries, contexts, strict=True)):
            if context:
                together = np.concatenate([vectors[row : row + 1], *context])
                weights: Sequence[float] = (1.0, *query.weights)
                if not query.weights:
                    nearest = self._nearest(together, 1, among)
                    best = [max((match.score for match in one), default=0.0) for one in nearest]
                    weights = turn_weights(best, query.turn_weight)
                joined = np.array(weights, np.float32) @ together
                vectors[row] = joined / max(np.linalg.norm(joined), np.finfo(np.float32).tiny)
        return vectors

    def _found(
        self,
        queries: Sequence[Query],
        vectors: Embeddings,
        contexts: Sequence[Sequence[Embeddings]],
        k: int,
        where: Where,
    ) -> list[list[Match]]:
        """The first ``k`` of each query, by one search or by two."""
        if where and self.members is None:
            raise ConfigError("this retriever does not know which memories meet conditions")
        among = self.members(where) if where and self.members else None
        vectors = self._with_context(vectors, queries, contexts, among)
        if self.lexical is None:
            return self._nearest(vectors, k, among)
        depth = max(_DEPTH, k)
        nearest = self._nearest(vectors, depth, among)
        hits = [ids.tolist() for ids, _ in self.lexical.search([query.words for query in queries], depth, among)]
        dense = [[] if self.alone else [match.id for match in row] for row in nearest]
        return [fused(row, (ids, words), k) for row, ids, words in zip(nearest, dense, hits, strict=True)]

    def _nearest(self, vectors: Embeddings, k: int, among: Ids | None) -> list[list[Match]]:
        if among is None:
            ids, scores = self.index.search(vectors, k)
        else:
            ids, scores = self.index.search_among(among, vectors, k)
        return [
            [Match(int(id), float(score)) for id, score in zip(*row, strict=True)]
            for row in zip(ids, scores, strict=True)
        ]

    def _chosen(
        self, nearest: Sequence[Match], limits: Restriction, wanted: int, depth: int
    ) -> tuple[list[Match], bool]:
        """Those of the ``depth`` nearest that are recalled, and False if a longer list may have more of them."""
        floor = self.min_score if limits.min_score is None else limits.min_score
        found = passing(nearest, min_score=floor, margin=self.margin)
        most = wanted if limits.memories is None else min(wanted, limits.memories)
        if self.duplicates is None:
            return found[:most], True
        joined = self.duplicates.joined(found, most)
        return joined, len(joined) == most or len(found) < depth


def passing(matches: Sequence[Match], *, min_score: float, margin: float | None) -> list[Match]:
    """The matches, best first, that score at least ``min_score`` and the best score less ``margin``."""
    if not matches:
        return []
    floor = min_score if margin is None else max(min_score, matches[0].score - margin)
    return [match for match in matches if match.score >= floor]


def log_weights(matches: Sequence[Match], temperature: float | None) -> tuple[float, ...]:
    """The numbers that attention adds to the logits of each memory's keys: ``(score - best score) / temperature``.

    Memories that match less are attended to less; with None, all alike.
    """
    if temperature is None or not matches:
        return (0.0,) * len(matches)
    best = max(match.score for match in matches)
    return tuple((match.score - best) / temperature for match in matches)
