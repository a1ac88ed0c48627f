"""`Reranking`: the first candidates of a search in the order of a reranker."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from m3runtime.retrieval.match import Match, References
from m3runtime.retrieval.reranker import Reranker

_KEPT = 16_384
"""Judgements that are kept."""


class Reranking:
    """Orders matches by a reranker, and keeps its judgements: each text is read once for a question. Thread-safe.

    So a recall waits for the reranker only for texts that the hint before it did not find. One thread runs the reranker
    at a time, and others wait for what it judges.
    """

    def __init__(self, reranker: Reranker, references: References, candidates: int) -> None:
        self.reranker = reranker
        self.candidates = candidates
        """Matches that are read, the nearest ones."""
        self._references = references
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        self._kept = OrderedDict[tuple[str, int], float]()

    def ordered(self, question: str, matches: Sequence[Match]) -> list[Match]:
        """The first `candidates` of the matches as the reranker orders them, and the others behind them.

        Judgements are no cosines. So the first gets the score of the nearest, the second that of the second nearest
        and so on: thresholds and weights keep their meaning.
        """
        read, rest = matches[: self.candidates], matches[self.candidates :]
        judged = self._judged(question, [match.id for match in read])
        # Sorting is stable: those that nobody remembers any more come last, as near as they are.
        order = sorted(read, key=lambda match: -judged.get(match.id, float("-inf")))
        return [*(Match(one.id, place.score) for one, place in zip(order, read, strict=True)), *rest]

    def _judged(self, question: str, ids: Sequence[int]) -> Mapping[int, float]:
        found = self._known(question, ids)
        if len(found) < len(ids):
            with self._reading:
                found = self._known(question, ids)  # another thread may have judged them
                references = self._references([id for id in ids if id not in found])
                if references:
                    scores = self.reranker.score(question, [one.headed for one in references.values()])
                    new = dict(zip(references, scores.tolist(), strict=True))
                    found |= new
                    with self._lock:
                        self._kept.update(((question, id), score) for id, score in new.items())
                        while len(self._kept) > _KEPT:
                            self._kept.popitem(last=False)
        return found

    def _known(self, question: str, ids: Sequence[int]) -> dict[int, float]:
        with self._lock:
            found = {id: self._kept[question, id] for id in ids if (question, id) in self._kept}
            for id in found:
                self._kept.move_to_end((question, id))
        return found
