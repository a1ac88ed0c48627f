"""`pack`: consecutive leaves of a text, joined into passages at the least cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from m3runtime.documents.cutting import Span

_ALONE = 3.0
"""Cost of a passage of no tokens, on top of the cost of any passage, which is 1. It falls to 0 at the least length."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A span that is not cut any more, and the cost of what may happen before it."""

    span: Span
    tokens: int
    section: int
    """The number of its section."""
    cut: float = 0.0
    """Cost of beginning a passage with it."""
    join: float = 0.0
    """Cost of a passage that has it and the leaf before it."""


def pack(leaves: Sequence[Leaf], *, least: int, most: int) -> list[Sequence[Leaf]]:
    """The leaves, cut into passages of at most ``most`` tokens at the least cost.

    A passage costs 1, the square of the share of ``most`` that it lacks, a share of `_ALONE` if it has fewer than
    ``least`` tokens, and the costs of its leaves. So passages are few and equally long, and cut where it costs little.
    A leaf of more than ``most`` tokens is a passage. Time is linear in the leaves, of which a passage has at most
    ``most``.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the leaves before a place, and where their last passage begins
    for end in range(1, len(leaves) + 1):
        tokens, joins = 0, 0.0
        cost, start = float("inf"), end - 1
        for begin in range(end - 1, -1, -1):
            leaf = leaves[begin]
            tokens += leaf.tokens
            if tokens > most and begin < end - 1:
                break
            lack = max(0.0, 1 - tokens / most)
            here = best[begin][0] + 1 + lack * lack + joins + (leaf.cut if begin else 0.0)
            if tokens < least:
                here += _ALONE * (1 - tokens / least)
            if here < cost:
                cost, start = here, begin
            joins += leaf.join
        best.append((cost, start))
    passages: list[Sequence[Leaf]] = []
    end = len(leaves)
    while end:
        start = best[end][1]
        passages.append(leaves[start:end])
        end = start
    return passages[::-1]
