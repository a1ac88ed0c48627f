"""Choosing the next token, with transformers' own logits processors."""

from typing import Any

import torch
from torch import Tensor

from m3runtime.config import GenerateConfig


class Sampler:
    """Chooses tokens for each row of a batch.

    Every row has a random generator of its own, seeded by the seed and nothing else, so that a row draws the same
    tokens alone and in a batch.
    """

    def __init__(self, settings: GenerateConfig, prompts: list[list[int]]) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._processors: Any = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        self._greedy = settings.temperature == 0.0
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(settings.top_p))
        self._seen = [torch.tensor([prompt], dtype=torch.int64) for prompt in prompts]
        self._random = [torch.Generator().manual_seed(settings.seed) for _ in prompts]

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row of ``logits``, ``[B, vocabulary]``."""
        return [self._choose(row, scores) for row, scores in enumerate(logits.float().cpu())]

    def _choose(self, row: int, scores: Tensor) -> int:
        processed = self._processors(self._seen[row], scores[None])[0]
        if self._greedy:
            token = int(processed.argmax())
        else:
            token = int(torch.multinomial(processed.softmax(-1), 1, generator=self._random[row]))
        if self._processors:
            self._seen[row] = torch.cat([self._seen[row], torch.tensor([[token]])], dim=1)
        return token
