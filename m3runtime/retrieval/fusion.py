"""`fused`: two searches joined by the ranks of what they found."""

from collections import defaultdict
from collections.abc import Sequence

from m3runtime.retrieval.match import Match

_CONSTANT = 5
"""The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009): larger, first ranks count less.

Chosen on corpora of its own (docs/quality.md). With the usual 60, a text that both searches find at the twentieth place
comes before one that only one of them finds at the first.
"""


def fused(nearest: Sequence[Match], others: Sequence[Sequence[int]], k: int) -> list[Match]:
    """The first ``k`` of all ids by the sum of their reciprocal ranks in the ``others``, which are ids in order.

    Scores of different searches cannot be compared. So the first gets the score of the nearest, the second that of the
    second nearest and so on: thresholds and weights keep their meaning, and if the order stays, nothing changes.
    """
    ranks = defaultdict[int, float](float)
    for ids in others:
        for rank, id in enumerate(ids, 1):
            ranks[id] += 1 / (_CONSTANT + rank)
    order = sorted(ranks, key=lambda id: (-ranks[id], id))[:k]
    return [Match(id, one.score) for id, one in zip(order, nearest, strict=False)]
