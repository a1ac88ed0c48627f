"""Choosing the next token, with transformers' own logits processors."""

from typing import Any

import torch
from torch import Tensor

from m3runtime.config.schema import GenerateConfig


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
        self._random = [torch.Generator().manual_seed(settings.seed) for _ in prompts]
        # What a repetition penalty counts. Once or more often is the same, so a row's first token fills it up.
        width = max(map(len, prompts), default=0) if settings.repetition_penalty != 1.0 else 0
        self._seen = torch.tensor([[*row, *row[:1] * (width - len(row))][:width] for row in prompts], dtype=torch.int64)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row of ``logits``, ``[B, vocabulary]``: int64 ``[B]`` on their device.

        Greedily, nothing is copied from the device and nobody waits for it.
        """
        scores = logits
        if self._processors:
            self._seen = self._seen.to(logits.device)
            scores = self._processors(self._seen, logits.float())
        if self._greedy:
            tokens = scores.argmax(-1)
        else:
            # Drawn on the CPU: generators of devices differ.
            chances = scores.float().softmax(-1).cpu()
            drawn = [
                torch.multinomial(row, 1, generator=random) for row, random in zip(chances, self._random, strict=True)
            ]
            tokens = torch.cat(drawn).to(logits.device)
        if self._seen.shape[1]:
            self._seen = torch.cat([self._seen, tokens[:, None]], dim=1)
        return tokens
