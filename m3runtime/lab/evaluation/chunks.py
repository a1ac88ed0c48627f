"""`chunk_lengths`: the effect of the chunk length, measured on held-out passages of real text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.evaluation.passages import hold_out
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean
from m3runtime.lab.evaluation.text_run import run_text
from m3runtime.lab.evaluation.trials import changed
from m3runtime.writing.writer import OnProgress

LENGTHS = (16, 32, 64, 96)
SCORED = 192
"""Scored tokens of a passage, in chunks of any length."""
BANK = 24_000
"""Tokens of documents to use: a bank is written for every length, so few are enough."""


@dataclass(frozen=True, slots=True)
class ChunkLength:
    """The result for one chunk length. Log-likelihoods are means per token."""

    tokens: int
    alone: Estimate
    memory: Estimate
    gain: Estimate
    """Log-likelihood with memory less that without, in pairs of passages."""
    recalls: int
    """Recalls per passage."""


def chunk_lengths(
    config: Config,
    adapter: Adapter,
    documents: Sequence[Document],
    folder: Path,
    *,
    passages: int,
    seed: int,
    progress: OnProgress,
) -> tuple[ChunkLength, ...]:
    """Score held-out passages of some documents, drawn by the seed, with every chunk length.

    Resumes the runs in ``folder``. Raises `InputError` if there is too little text.
    """
    found = []
    some = _some(documents, adapter, seed)
    for tokens in LENGTHS:
        settings = changed(
            config,
            {
                "recall.chunk_tokens": tokens,
                "recall.lookahead_tokens": min(config.recall.lookahead_tokens, tokens // 2),
            },
        )
        corpus = hold_out(
            some,
            adapter,
            passages=passages,
            chunk_tokens=tokens,
            reference_tokens=adapter.spec.reference_tokens,
            continuation=SCORED // tokens,
            seed=seed,
        )
        results = run_text(
            settings, adapter, corpus, folder / f"chunks-{tokens}", modes=("none", "memory"), progress=progress
        )
        alone, memory = results.passage_means("none"), results.passage_means("memory")
        found.append(
            ChunkLength(
                tokens, mean(alone, seed), mean(memory, seed), difference(memory, alone, seed), SCORED // tokens
            )
        )
    return tuple(found)


def _some(documents: Sequence[Document], adapter: Adapter, seed: int) -> list[Document]:
    """Drawn documents of about `BANK` tokens in total, each cut to at most a tenth of that."""
    drawn, tokens = [], 0
    for document in random.Random(seed).sample(list(documents), len(documents)):
        if tokens >= BANK:
            break
        text = "".join(adapter.cut(document.text, BANK // 10)[:1])
        drawn.append(Document(document.name, text))
        tokens += adapter.count_tokens(text)
    return drawn
