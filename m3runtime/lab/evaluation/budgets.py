"""``m3 eval budgets``: how many tokens each KV head should keep, by the attention that tokens receive.

In each reference the tokens are kept that receive most attention from a model which repeats the text, over all memory
layers and KV heads. Some heads keep many of them and others few, much the same ones in every text. The budget of a head
is its mean share. Attention within the reference says too little about that, whatever tokens are kept by later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.adapters.selecting import TokenScoring
from m3runtime.config.schema import Config, MemoryConfig
from m3runtime.documents.reading import one_word, read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import ConfigError, InputError
from m3runtime.lab.evaluation.journal import silent
from m3runtime.writing.writer import OnProgress

LEAST = 1 / 5
"""The share of the mean that each head keeps at least."""
_FEWEST = 4
"""References, below which nothing can be told."""
_STEPS = 40


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """The settings of ``m3 eval budgets``."""

    corpus: tuple[str, ...]
    tokens: int = 32
    references: int = 64
    seed: int = 0

    @property
    def command(self) -> str:
        """The command that has these settings."""
        corpus = " ".join(f"--corpus {path}" for path in self.corpus)
        return f"m3 eval budgets {corpus} --tokens {self.tokens} --references {self.references} --seed {self.seed}"


@dataclass(frozen=True, slots=True)
class BudgetResults:
    """The results of ``m3 eval budgets``."""

    layers: tuple[int, ...]
    budgets: tuple[tuple[int, ...], ...]
    """By memory layer, the tokens of each KV head."""
    references: int
    mean: float
    """Tokens that a head of these references keeps, on average."""
    held: tuple[float, float]
    """The share of attention that falls on kept tokens: with budgets, and with as many tokens in each head."""
    fingerprints: dict[str, str]


def fit_budgets(
    config: Config,
    settings: BudgetSettings,
    open_adapter: Callable[[Config], Adapter],
    progress: OnProgress = silent,
) -> BudgetResults:
    """Fit budgets to references out of the texts, which are read as `m3 write` reads them. No bank is touched.

    Raises `InputError` for too few references, or texts that cannot be read, and `ConfigError` for a model whose heads
    cannot have budgets.
    """
    documents = list(read_documents([Path(path) for path in settings.corpus]))
    memory = config.memory.model_copy(update={"tokens_per_head": settings.tokens, "select_by": "repeat"})
    adapter = open_adapter(config.model_copy(update={"memory": memory}))
    if not isinstance(adapter, TokenScoring):
        raise ConfigError(f"model.adapter: {type(adapter).__name__} does not score tokens")
    spec = adapter.spec
    adapter.with_memory(_with(memory, [[settings.tokens] * spec.kv_heads] * len(spec.layers)))  # raises
    splitter = Splitter(adapter.count_tokens, max_tokens=spec.reference_tokens)
    pieces = (piece.text for document in documents for piece in splitter.split(document.text))
    unique = sorted({text for text in pieces if not one_word(text)})
    if len(unique) < _FEWEST:
        raise InputError(f"the texts give {len(unique)} references, and at least {_FEWEST} are needed")
    texts = Random(settings.seed).sample(unique, min(settings.references, len(unique)))
    scores: list[Tensor] = []
    for start in range(0, len(texts), memory.batch_size):
        progress("Scoring tokens", start, len(texts))
        memories, found = adapter.encode_scored(texts[start : start + memory.batch_size])
        scores += [one[..., :count].cpu() for one, count in zip(found, memories.tokens.tolist(), strict=True)]
    budgets = fitted(scores, settings.tokens, spec.reference_tokens)
    return BudgetResults(
        layers=spec.layers,
        budgets=tuple(tuple(layer) for layer in budgets.tolist()),
        references=len(texts),
        mean=float(torch.stack([budgets.clamp_max(one.shape[2]).float().mean() for one in scores]).mean()),
        held=(held(scores, budgets), held(scores, torch.full_like(budgets, settings.tokens))),
        fingerprints={"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint},
    )


def _with(memory: MemoryConfig, budgets: Sequence[Sequence[int]]) -> MemoryConfig:
    return memory.model_copy(update={"tokens_per_head": tuple(map(tuple, budgets))})


def fitted(scores: Sequence[Tensor], tokens: int, most: int) -> Tensor:
    """Budgets by which heads keep ``tokens`` tokens on average, ``int64[layers, kv_heads]``, each at most ``most``.

    ``scores`` are those of references, ``[layers, kv_heads, tokens of the reference]`` each.
    """
    shares = torch.stack([_kept(one, tokens).float() / min(tokens, one.shape[2]) for one in scores]).mean(0)
    lengths = torch.tensor([one.shape[2] for one in scores])[:, None, None]
    wanted = float(lengths.clamp_max(tokens).float().mean())
    low, high = 0.0, most / float(shares.min())
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if float(_whole(shares * middle, most).minimum(lengths).float().mean()) > wanted:
            high = middle
        else:
            low = middle
    return _whole(shares * low, most)


def held(scores: Sequence[Tensor], budgets: Tensor) -> float:
    """The share of all scores that falls on the tokens that heads of these budgets keep."""
    kept = total = 0.0
    for one in scores:
        ordered = one.sort(-1, descending=True).values
        kept += float(ordered[torch.arange(one.shape[2]) < budgets[..., None]].sum())
        total += float(ordered.sum())
    return kept / total


def _whole(budgets: Tensor, most: int) -> Tensor:
    return budgets.round().long().clamp(1, most)


def _kept(scores: Tensor, tokens: int) -> Tensor:
    """How many tokens of a reference each head keeps, ``int64[layers, kv_heads]``, if all share them."""
    layers, heads, count = scores.shape
    certain = scores.topk(min(max(1, int(tokens * LEAST)), count), -1).indices
    ranked = scores.scatter(-1, certain, torch.inf).flatten()
    chosen = ranked.topk(min(layers * heads * tokens, len(ranked))).indices
    return torch.bincount(chosen // count, minlength=layers * heads).view(layers, heads)
