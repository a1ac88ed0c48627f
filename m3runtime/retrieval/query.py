"""`Query`: a text to search by, together with what it follows on."""

from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 8
"""Earlier messages that count, the newest ones."""
_OWN = 0.7
"""A message has a subject of its own if its nearest memory scores this share of the best of all messages' nearest."""
_AFTER_OWN = 0.6
"""What such a message leaves of the weight of those before it, if it is the last one."""
_FALL = 0.5
"""What an earlier one leaves of the weight of those before it."""


@dataclass(frozen=True, slots=True)
class Query:
    """A text to search by, and further texts: either with their weights, or earlier messages, the newest first."""

    text: str
    context: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    """One for each text of the context; the text itself weighs 1."""
    turn_weight: float = 0.0
    """Without ``weights``: that of an earlier message which tells a subject; see `turn_weights`."""

    answers: str = ""
    """The question that the text is a part of the answer to."""

    @classmethod
    def of(cls, text: "str | Query") -> "Query":
        """A text alone as a query; a query as it is."""
        return cls(text) if isinstance(text, str) else text

    @classmethod
    def following(cls, text: str, earlier: Sequence[str], weight: float) -> "Query":
        """A message that follows earlier ones, the newest first. With weight 0 it is searched by alone."""
        context = tuple(one for one in earlier if one.strip())[:_MOST] if weight else ()
        return cls(text, context, turn_weight=weight if context else 0.0)

    @property
    def question(self) -> str:
        """The question that a reranker judges by: the same for all chunks of an answer; else all texts in order."""
        return self.answers or "\n".join((*reversed(self.context), self.text))

    @property
    def words(self) -> str:
        """All texts in one, for a search by words."""
        return "\n".join((self.text, *self.context))


Text = str | Query
"""A text to search by, alone or with what it follows on."""


def turn_weights(scores: Sequence[float], weight: float) -> list[float]:
    """The weights of a message and of earlier ones, the newest first, by the score of each one's nearest memory.

    "Who designed it?" is near to nothing, and so counts little beside the message that named the subject, however many
    such follow-ups lie in between. A message that names another subject counts fully.
    """
    best = max(scores)
    if best <= 0:
        return [1.0, *[0.0] * (len(scores) - 1)]
    shares = [max(0.0, score) / best for score in scores]
    is_own = shares[0] > _OWN
    found, left = [1.0 if is_own else shares[0] ** 2], weight * (_AFTER_OWN if is_own else 1)
    for share in shares[1:]:
        found.append(left * share**2)
        left *= _FALL if share > _OWN else 1
    return found
