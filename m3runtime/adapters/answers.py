"""Prompts of a model and what it makes of them: `Prompt`, `Answer`, `Score`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from m3runtime.adapters.grounding import Grounding

if TYPE_CHECKING:
    from m3runtime.recall.recalled import Recalled

Form = Literal["question", "reference", "chat", "plain"]
"""The form of a question to a model: see ``generate.prompt``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a sequence.

    ``query`` is what memories are searched for while the prompt is read, if that is not the prompt's own text: a
    question without the words of its template, for example.
    """

    text: str
    query: str | None = None
    context: tuple[str, ...] = ()
    """Earlier messages of the user, which ``query`` follows on, the newest first."""
    literal: tuple[tuple[int, int], ...] = ()
    """Spans of the text, in order, in which the marker of a special token is text: somebody's words have one there."""


@dataclass(frozen=True, slots=True)
class TokenLogProb:
    """The likelihood of a generated token, by the model's logits as they are: before penalties and temperature."""

    token: int
    log_prob: float
    """Natural logarithm of its probability."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, best first, with theirs; as many as ``generate.log_probs``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The text generated after a prompt."""

    text: str
    tokens: tuple[int, ...]
    """Generated token ids, a stop token left out."""
    stopped_by: Literal["token", "text", "length", "cancel"]
    chunks: "tuple[Recalled, ...]" = field(repr=False)
    """The recalls, in order: of each chunk of the prompt, then of each chunk of generated tokens."""
    first_token_s: float
    """Seconds from the call to the first token, recall included."""
    tokens_per_s: float
    """Tokens a second after the first; 0 for a single token."""
    log_probs: tuple[TokenLogProb, ...] = field(default=(), repr=False)
    """One for each token, if ``generate.log_probs`` asks for them."""
    grounding: Grounding | None = field(default=None, repr=False)
    """The memories that each token was read from; None unless ``generate.grounding`` asks for it."""
    evidence: float | None = None
    """How far the memory that was read most bears the answer out; see `m3runtime.adapters.evidence`. None as above."""
    grounded: bool | None = None
    """Is the evidence at least ``generate.grounding_floor``? None if either is None."""

    @property
    def found(self) -> bool:
        """Was anything recalled? If not, the answer is the model's own."""
        return any(len(chunk) for chunk in self.chunks)

    @property
    def memories(self) -> "Mapping[int, float]":
        """The ids that were read, and the highest score each had."""
        best: dict[int, float] = {}
        for chunk in self.chunks:
            for id, score in zip(chunk.ids, chunk.scores, strict=True):
                best[id] = max(score, best.get(id, -1.0))
        return best


@dataclass(frozen=True, slots=True)
class Score:
    """The likelihood that a model gave a continuation."""

    log_probs: tuple[float, ...]
    """Natural logarithm of the probability of each of its tokens, given what stands before it."""
    chunks: "tuple[Recalled, ...]" = field(repr=False)
    """The recalls, as in `Answer.chunks`."""


OnText = Callable[[int, str], None]
"""Called with the row of the batch and the text that has become certain since the last call."""
