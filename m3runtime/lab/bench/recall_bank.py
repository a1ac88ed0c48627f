"""``m3 bench recall --bank``: recalls over the configured bank, cold and warm, against embedding their query."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.bench.recall import WHOLE, RecallTimes, measured, recall_table, timed_recall
from m3runtime.lab.bench.timing import threads, turns
from m3runtime.lab.results import Result, Spread, environment
from m3runtime.runtime import Runtime
from m3runtime.storage.opening import HOME
from m3runtime.writing.writer import OnProgress

COLD, WARM = "cold", "warm"
_WORDS = 48
"""Words of a query, about 64 tokens: a chunk."""
_FEWEST_ROUNDS = 3
_CANDIDATES = 64
"""Texts that are searched for at once while queries are chosen."""


@dataclass(frozen=True, slots=True)
class RecallBankSettings:
    """The settings of `bench_bank`."""

    rounds: int = 30
    """Fewer if the bank has not as many queries whose memories are all different."""
    memories: int = 5
    """Memories of one recall."""
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RecallBankBench(Result):
    """The result of `bench_bank`."""

    settings: RecallBankSettings
    device: str
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    memory_tokens: Spread
    """Tokens of memory that a cold recall delivers."""
    rows: Sequence[RecallTimes]
    """`COLD`: no memory is decoded yet. `WARM`: the same memories were recalled by another stream before."""
    cold_of_warm: Spread
    """The time of a cold recall over the time of a warm one in the same round."""
    warm_decoded: int
    """Warm recalls that read or decoded a block nevertheless."""
    warm_other: int
    """Warm recalls that chose other memories than the cold recall of the same text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield recall_table(self.rows)
        for row in self.rows:
            yield f"{row.name}: {row.of_embedding[WHOLE].show(2)} times the embedding of the query"
        yield f"cold over warm: {self.cold_of_warm.show(2)}"
        rounds = self.settings.rounds
        yield (
            f"warm recalls that read or decoded a block: {self.warm_decoded} of {rounds}; that chose other memories: "
            f"{self.warm_other}"
        )
        yield (
            f"on {self.device}; {self.settings.threads} threads; {rounds} rounds; {self.settings.memories} memories, "
            f"{self.memory_tokens.show(0)} tokens; no caching tiers, page cache as it is; {environment()['machine']}"
        )


def bench_bank(config: Config, settings: RecallBankSettings, progress: OnProgress) -> RecallBankBench:
    """Measure recalls over the configured bank, which is opened read-only, without caching tiers.

    Each round recalls for two texts, in an order that is drawn: one whose memories were never recalled before (cold),
    and the one that was cold a round ago, by a new stream (warm). Raises `InputError` if the bank has too few
    references, and what `Runtime.open` raises.
    """
    config = measured(config, settings.memories)
    only_home = (config.tiers or (HOME,))[-1:]
    config = config.model_copy(update={"tiers": only_home, "metrics": config.metrics.model_copy(update={"port": None})})
    with threads(settings.threads), Runtime.open(config, read_only=True) as runtime:
        texts = _queries(runtime, settings, progress)
        settings = replace(settings, rounds=len(texts) - 2)
        every = settings.rounds + 1
        seconds: dict[str, list[dict[str, float]]] = {COLD: [], WARM: []}
        first, _ = timed_recall(runtime, texts[0])
        ids, tokens, other = [set(first.ids)], list[int](), 0
        for number, name in turns(list(seconds), settings.rounds, lambda done: progress("Recalling", done, every)):
            # The cache of query embeddings knows a text by its spelling: a space more, and it is embedded again.
            text = texts[number + 1] if name == COLD else f"{texts[number]} "
            recalled, phases = timed_recall(runtime, text)
            if name == COLD:
                ids.append(set(recalled.ids))
                tokens.append(recalled.tokens)
            else:
                other += set(recalled.ids) != ids[number]
            if number:
                seconds[name].append(phases)
        progress("Recalling", every, every)
        home = len(runtime.bank.home)
        return RecallBankBench(
            settings=settings,
            device=str(runtime.device),
            config=config.model_dump(mode="json"),
            fingerprints=runtime.bank.manifest.fingerprints(),
            memory_tokens=Spread.of(tokens),
            rows=[RecallTimes.of(name, home, recalls) for name, recalls in seconds.items()],
            cold_of_warm=Spread.ratio(*([one[WHOLE] for one in seconds[name]] for name in (COLD, WARM))),
            warm_decoded=sum(one["read"] + one["decode"] > 0 for one in seconds[WARM]),
            warm_other=other,
        )


def _queries(runtime: Runtime, settings: RecallBankSettings, progress: OnProgress) -> list[str]:
    """Beginnings of the bank's references of which no two recall the same memory: two more than there are rounds."""
    wanted = settings.rounds + 2
    ids = runtime.bank.home.ids().tolist()
    random.Random(settings.seed).shuffle(ids)
    chosen: list[str] = []
    recalled: set[int] = set()
    for start in range(0, len(ids), _CANDIDATES):
        progress("Choosing queries", len(chosen), wanted)
        references = runtime.references(ids[start : start + _CANDIDATES])
        texts = list(dict.fromkeys(" ".join(one.text.split()[:_WORDS]) for one in references if one))
        for text, matches in zip(texts, runtime.search(texts, settings.memories), strict=True):
            nearest = {match.id for match in matches}
            if nearest and len(chosen) < wanted and recalled.isdisjoint(nearest):
                chosen.append(text)
                recalled |= nearest
        if len(chosen) == wanted:
            break
    progress("Choosing queries", wanted, wanted)
    if len(chosen) < _FEWEST_ROUNDS + 2:
        raise InputError(
            f"the bank at {runtime.config.bank} has {len(chosen)} texts that recall different memories, "
            f"{_FEWEST_ROUNDS + 2} are needed; recall fewer memories with --memories, or write more references"
        )
    return chosen
