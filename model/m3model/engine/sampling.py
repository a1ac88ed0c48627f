"""`Sampling`: the next tokens of many rows, each with settings of its own, without asking the host.

The order is the transformers library's: bias, penalties, temperature, top-k, top-p, min-p. A drawn token depends on the
row's logits, settings and one number of its own that its seed gave (`uniforms`): not on who else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m3runtime.config.schema import GenerateConfig

NO_TOKEN = -1
"""In place of a token: the model's numbers overflowed."""

_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass(frozen=True, slots=True)
class Kinds:
    """What the rows of a step ask for: the parts of `Sampling.choose` that it runs, and whether it tells of shares."""

    draws: bool = False
    penalises: bool = False
    biased: bool = False
    log_probs: int | None = None
    """The most of the likeliest tokens that a row asks for; None if none asks for log-probabilities."""
    grounding: bool = False

    @classmethod
    def of(cls, settings: Sequence[GenerateConfig]) -> "Kinds":
        """What these settings ask for together."""
        counts = [one.log_probs for one in settings if one.log_probs is not None]
        return cls(
            draws=any(one.temperature > 0 for one in settings),
            penalises=any(
                one.repetition_penalty != 1 or one.frequency_penalty or one.presence_penalty for one in settings
            ),
            biased=any(one.logit_bias for one in settings),
            log_probs=max(counts, default=None),
            grounding=any(one.grounding for one in settings),
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a step, one for each row of its logits."""

    tokens: Tensor
    """int64 ``[n]``; `NO_TOKEN` where the logits are no numbers."""
    log_probs: Tensor | None = None
    """Natural logarithms of their probabilities by the logits as they are, float32 ``[n]``."""
    likeliest: Tensor | None = None
    """The likeliest tokens, best first, int64 ``[n, log_probs]``,"""
    likeliest_log_probs: Tensor | None = None
    """and theirs."""
    shares: Tensor | None = None
    """See `m3model.engine.step.StepCache.shares`."""


def uniforms(seed: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The numbers in [0, 1) that the first ``count`` tokens of a sequence are drawn by."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)


class Sampling:
    """The settings and the tokens of all rows. Not thread-safe; one more row takes what belongs to no sequence."""

    def __init__(self, device: torch.device, vocabulary: int) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self._settings = torch.zeros(0, len(_FIELDS), device=device)
        self._top_k = torch.zeros(0, dtype=torch.int64, device=device)
        # Of a row's prompt whether, and of its answer how often; allocated when a row first asks for it.
        self._prompted = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)
        self._written = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self._bias = torch.zeros(0, vocabulary, device=device)

    def reserve(self, rows: int, kinds: Kinds) -> bool:
        """Make room for so many rows; is anything in another place now?"""
        grown = [self._grow("_settings", rows), self._grow("_top_k", rows)]
        if kinds.penalises or len(self._written):
            grown += [self._grow("_prompted", rows), self._grow("_written", rows)]
        if kinds.biased or len(self._bias):
            grown.append(self._grow("_bias", rows))
        return any(grown)

    def _grow(self, name: str, rows: int) -> bool:
        old: Tensor = getattr(self, name)
        if len(old) > rows:
            return False
        new = old.new_zeros(rows + 1, *old.shape[1:])
        new[: max(0, len(old) - 1)] = old[:-1]
        setattr(self, name, new)
        return True

    def begin(self, row: int, settings: GenerateConfig, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Give a row to a sequence with these settings, which has read and written so much."""
        self._settings[row] = torch.tensor([getattr(settings, name) for name in _FIELDS])
        self._top_k[row] = min(settings.top_k or self.vocabulary, self.vocabulary)  # it may be more than an integer
        if len(self._written):
            self._prompted[row] = False
            self._prompted[row, torch.tensor(prompt, dtype=torch.int64, device=self.device)] = True
            counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=self.vocabulary)
            self._written[row] = counts.to(self.device, torch.int32)
        if len(self._bias):
            self._bias[row] = 0
            if settings.logit_bias:
                places = torch.tensor(list(settings.logit_bias), device=self.device)
                self._bias[row, places] = torch.tensor(list(settings.logit_bias.values()), device=self.device)

    def move(self, row: int, to: int) -> None:
        """Move a row to another one."""
        for state in (self._settings, self._top_k, self._prompted, self._written, self._bias):
            if len(state):
                state[to] = state[row]

    def choose(self, logits: Tensor, rows: Tensor, uniform: Tensor, kinds: Kinds) -> Chosen:
        """A token for each row of ``logits``, ``[n, vocabulary]``.

        ``rows`` says which rows they are, int64 ``[n]``; ``uniform`` has their numbers of `uniforms`, float32 ``[n]``.
        """
        raw = scores = logits.float()
        settings: dict[str, Tensor] = {}
        if kinds.draws or kinds.penalises:
            settings = dict(zip(_FIELDS, self._settings[rows].unbind(1), strict=True))
        if kinds.biased:
            scores = scores + self._bias[rows]
        if kinds.penalises:
            scores = self._penalised(scores, rows, settings)
        tokens = scores.argmax(1)
        nonsense = scores.gather(1, tokens[:, None])[:, 0].isnan()  # for the greatest of them is one that is no number
        if kinds.draws:
            drawn = _draw(scores, settings, self._top_k[rows], uniform)
            tokens = torch.where(settings["temperature"] > 0, drawn, tokens)
        if kinds.penalises:
            self._written.index_put_((rows, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)
        told = tokens.masked_fill(nonsense, NO_TOKEN)
        if kinds.log_probs is None:
            return Chosen(told)
        all_log_probs = raw.log_softmax(1)
        best = all_log_probs.topk(kinds.log_probs, dim=1)
        return Chosen(told, all_log_probs.gather(1, tokens[:, None])[:, 0], best.indices, best.values)

    def _penalised(self, scores: Tensor, rows: Tensor, settings: dict[str, Tensor]) -> Tensor:
        written = self._written[rows]
        seen = self._prompted[rows] | (written > 0)
        factor = settings["repetition_penalty"][:, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
        scores = scores - settings["frequency_penalty"][:, None] * written
        return scores - settings["presence_penalty"][:, None] * (written > 0)


def _draw(scores: Tensor, settings: dict[str, Tensor], top_k: Tensor, uniform: Tensor) -> Tensor:
    """Draw by the inverse of the distribution's sum over tokens, likeliest first: int64 ``[n]``."""
    temperature = settings["temperature"]
    # Zero at the likeliest, for a temperature near 0 would give several tokens the same infinity.
    scaled = (scores - scores.amax(1, keepdim=True)) / torch.where(temperature > 0, temperature, 1)[:, None]
    ranked, order = scaled.sort(dim=1, descending=True, stable=True)
    places = torch.arange(ranked.shape[1], device=ranked.device)
    chances = ranked.masked_fill(places >= top_k[:, None], -torch.inf).softmax(1)
    before = chances.cumsum(1) - chances
    kept = (before < settings["top_p"][:, None]) & (chances >= settings["min_p"][:, None] * chances[:, :1])
    kept |= places == 0  # the likeliest one, whatever rounding says
    sums = torch.where(kept, chances, 0).cumsum(1)
    place = (sums <= uniform[:, None] * sums[:, -1:]).sum(1)
    return order.gather(1, torch.minimum(place, kept.sum(1) - 1)[:, None])[:, 0]
