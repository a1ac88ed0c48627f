"""``m3 bench decode``: the cost of reading memories while a model decodes, against its own library without them."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.bench.banks import bank_for
from m3runtime.lab.bench.comparison import Comparable
from m3runtime.lab.bench.decode_runs import KINDS, MEMORIES, NOTHING, PLAIN, TEXT, WITHOUT_LOOKAHEAD, Contenders, Run
from m3runtime.lab.bench.timeline import draw_timeline
from m3runtime.lab.bench.timing import threads, turns
from m3runtime.lab.results import Result, Spread, environment
from m3runtime.observe.figures import show_size
from m3runtime.writing.writer import OnProgress

PROMPT_TOKENS = 20
_PRE_ROUNDS = 2
_TRIED = 64
"""New tokens of a run that compares variants of the baseline with references in the prompt."""
_TIMELINE = 100_000


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """The settings of ``m3 bench decode``."""

    new_tokens: int = 256
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 7
    memories: int = 5
    references: int = 128
    """Most references in the temporary bank of a corpus."""
    threads: int = 2
    """CPU threads of the model."""
    seed: int = 0
    quick: bool = False
    """Run only `PLAIN` and `MEMORIES`, and do not compare tokens?"""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the contenders."""
        return (PLAIN, MEMORIES) if self.quick else KINDS


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """The times of one contender over all rounds."""

    tokens_per_s: Spread
    """Tokens per second of all sequences together, after the first token of each."""
    call_tokens_per_s: Spread
    """Tokens per second over the whole call, with reading the prompt and the first recall."""
    first_token_s: Spread
    kept: Spread
    """``tokens_per_s`` over the figure of `PLAIN` in the same round."""
    call_kept: Spread
    """``call_tokens_per_s`` over the figure of `PLAIN` in the same round."""
    first_token_of_text: Spread | None
    """``first_token_s`` over the figure of `TEXT` in the same round; None if `TEXT` does not take part."""


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Recalls at the ends of chunks, over all counted rounds, without the recall for the prompt."""

    chunks: int
    late: int
    """Memories that had not arrived by the deadline, also in chunks of the prompt."""
    waited: float
    """Share of decoding time spent waiting for memories that other threads load."""
    recalling: float
    """Share of decoding time spent in recalls: embedding, search, reading, decoding of memories, waiting."""
    phases: Mapping[str, float]
    """Median seconds of each phase of a recall."""
    kept: float
    """Share of a chunk's memories that the chunk before had too."""
    guesses: int
    """Prefetched memories; the last ones of a run may be for a chunk that did not come."""
    hit_rate: float
    """Share of prefetched memories that a chunk recalled."""
    foreseen: float
    """Share of prefetched memories among those that a chunk had and the chunk before had not."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The throughput that memory bandwidth allows, if nothing else takes time."""

    weight_bytes: int
    memory_tokens: float
    """Mean number of memory tokens that a sequence attends to."""
    memory_bytes: float
    """Bytes of memory keys and values that a step reads for one sequence."""
    kept: float
    """Bytes of the weights over bytes of the weights and of the memories of the batch."""


@dataclass(frozen=True, slots=True)
class BatchBench:
    """The results of one batch size."""

    batch: int
    variants: Mapping[str, Mapping[str, float | str]]
    """For `PLAIN` and `TEXT`: tokens per second of each variant of the baseline before round 1, or its error."""
    chosen: Mapping[str, str]
    """The fastest variant, which takes part in the rounds."""
    contenders: Mapping[str, DecodeTimes]
    boundaries: Mapping[str, Boundaries]
    bound: Bound
    same_tokens: Mapping[str, bool]
    """True for ways that give the same tokens as lookahead and caching tiers, with waiting; empty if quick."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("", "tokens/s", "kept", "first token, s", "of text's", title=f"Batch {self.batch}")
        for name, one in self.contenders.items():
            chosen = f" ({self.chosen[name]})" if name in self.chosen else ""
            table.add_row(
                name + chosen,
                one.tokens_per_s.show(1),
                "" if name == PLAIN else one.kept.show(3),
                one.first_token_s.show(3),
                one.first_token_of_text.show(3) if one.first_token_of_text else "",
            )
        yield table
        bound, ends = self.bound, self.boundaries[MEMORIES]
        yield (
            f"bytes allow {bound.kept:.3f}: {show_size(bound.weight_bytes)} of weights, "
            f"{self.batch} x {show_size(bound.memory_bytes)} of memories ({bound.memory_tokens:.0f} tokens); "
            f"{self.contenders[MEMORIES].kept.median / bound.kept:.3f} of that reached"
        )
        for name, each in self.boundaries.items():
            yield (
                f"{name}: recalls take {each.recalling:.2%} of decoding, of which {each.waited:.2%} is waiting; "
                f"{each.late} late in {each.chunks} chunks"
            )
        yield (
            f"the chunk before had {ends.kept:.0%} of a chunk's memories; {ends.foreseen:.0%} of the others were "
            f"prefetched; {ends.hit_rate:.0%} of {ends.guesses} prefetched memories were used"
        )
        for name, is_same in self.same_tokens.items():
            yield f"{name}: {'the same tokens' if is_same else 'OTHER TOKENS'}"


@dataclass(frozen=True, slots=True)
class DecodeBench(Result):
    """The results of ``m3 bench decode``."""

    settings: DecodeSettings
    model: str
    device: str
    dtype: str
    bank: str
    """Path and contents of the bank, for people."""
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    prompt_tokens: int
    batches: Sequence[BatchBench]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.batches
        settings = self.settings
        yield (
            f"{self.model}, {self.dtype}, on {self.device}; {settings.threads} threads; {settings.new_tokens} tokens "
            f"after {self.prompt_tokens}; {settings.rounds} rounds; bank: {self.bank}; {environment()['machine']}"
        )


def bench_decode(
    config: Config,
    adapter: Adapter,
    corpus: Sequence[Path],
    settings: DecodeSettings,
    plot: Path | None,
    progress: OnProgress,
) -> DecodeBench:
    """Measure every contender on the same prompts, in turns; each round has other prompts.

    Raises `InputError` if the adapter has no baseline, or there is neither bank nor corpus.
    """
    if not isinstance(adapter, Comparable):
        raise InputError(f"model.adapter: {type(adapter).__name__} has no baseline to compare with")
    with (
        threads(settings.threads),
        bank_for(config, adapter, corpus, settings.references, progress) as own,
        Contenders(measured(own, settings.memories), adapter, timeline=_TIMELINE if plot else 0) as contenders,
    ):
        prompts = draw_prompts(adapter, contenders.texts(), PROMPT_TOKENS, settings.seed)
        found = [_batch(contenders, prompts, size, settings, progress) for size in settings.batches]
        if plot:
            _, events = contenders.timeline(prompts[: settings.batches[0]], settings.new_tokens)
            draw_timeline(events, plot)
        manifest, home = contenders.bank.manifest, contenders.bank.home
        where = "temporary" if own is not config else str(config.bank)
        return DecodeBench(
            settings=replace(settings, references=len(home)),
            model=adapter.name,
            device=str(adapter.device),
            dtype=str(adapter.dtype).removeprefix("torch."),
            bank=f"{where}, {len(home)} memories, {home.stored_bytes()} bytes, page cache warm",
            config=contenders.config.model_dump(mode="json"),
            fingerprints=manifest.fingerprints(),
            prompt_tokens=max(adapter.count_tokens(prompt.text) for prompt in prompts),
            batches=found,
        )


def measured(config: Config, memories: int) -> Config:
    """The configuration to measure: every chunk gets ``memories`` memories, whatever its text is."""
    recall = config.recall.model_copy(update={"memories": memories, "min_score": -1.0, "margin": None, "trace": None})
    return config.model_copy(update={"recall": recall})


def draw_prompts(adapter: Adapter, texts: Sequence[str], tokens: int, seed: int) -> list[Prompt]:
    """Prompts of the first ``tokens`` tokens of texts, or of whole texts if all are shorter."""
    heads = sorted({adapter.cut(text, tokens)[0] for text in texts if text.strip()})
    full = [head for head in heads if adapter.count_tokens(head) == tokens] or heads
    if not full:
        raise InputError("the bank has no text to take prompts from")
    random.Random(seed).shuffle(full)
    return [Prompt(head) for head in full]


def _batch(
    contenders: Contenders, prompts: Sequence[Prompt], size: int, settings: DecodeSettings, progress: OnProgress
) -> BatchBench:
    rounds = settings.rounds
    asked = [[prompts[(number * size + row) % len(prompts)] for row in range(size)] for number in range(rounds + 1)]
    prompted = {PLAIN: asked}
    if TEXT in settings.kinds:
        prompted[TEXT] = [contenders.with_text(some) for some in asked]
    phase = f"Choosing a baseline, batch {size}"
    variants: dict[str, dict[str, float | str]] = {kind: {} for kind in prompted}
    chosen: dict[str, str] = {}
    names = contenders.baseline.variants
    tries = len(prompted) * _PRE_ROUNDS * len(names)
    # The baseline is chosen by whole runs; with text in the prompt, reading the prompt takes most of the time.
    tried = {PLAIN: settings.new_tokens, TEXT: min(_TRIED, settings.new_tokens)}
    for place, (kind, some) in enumerate(prompted.items()):
        room = contenders.room(some, settings.new_tokens)
        for number, variant in [(number, name) for number in range(_PRE_ROUNDS) for name in names]:
            done = (place * _PRE_ROUNDS + number) * len(names) + names.index(variant)
            progress(phase, done, tries)
            best = variants[kind].get(variant, 0.0)
            if isinstance(best, float):
                speed = contenders.try_variant(some[number % len(some)], tried[kind], variant, room)
                variants[kind][variant] = speed if isinstance(speed, str) else max(speed, best)
        usable = {name: speed for name, speed in variants[kind].items() if isinstance(speed, float)}
        if not usable:
            raise InputError(f"no variant of the baseline runs here: {next(iter(variants[kind].values()))}")
        chosen[kind] = max(usable, key=lambda name: usable[name])
        contenders.choose(kind, chosen[kind], room)
    progress(phase, tries, tries)
    title = f"Decoding, batch {size}"
    runs: dict[str, list[Run]] = {name: [] for name in settings.kinds}
    before = dict.fromkeys(runs, contenders.cool)
    for number, name in turns(list(runs), rounds, lambda done: progress(title, done, rounds + 1), before):
        run = contenders.run(name, prompted.get(name, asked)[number], settings.new_tokens)
        if number:
            runs[name].append(run)
    progress(title, rounds + 1, rounds + 1)
    return BatchBench(
        batch=size,
        variants=variants,
        chosen=chosen,
        contenders={name: contender(runs, name) for name in runs},
        boundaries={name: boundaries(runs[name]) for name in (NOTHING, MEMORIES, WITHOUT_LOOKAHEAD) if name in runs},
        bound=bound(contenders, runs[MEMORIES], size),
        same_tokens={} if settings.quick else contenders.same_tokens(asked[0], settings.new_tokens),
    )


def contender(runs: Mapping[str, Sequence[Run]], name: str) -> DecodeTimes:
    """The times of one contender; runs at equal places are of one round."""
    own, plainly, text = runs[name], runs[PLAIN], runs.get(TEXT)
    speeds, calls = [run.tokens_per_s for run in own], [run.call_tokens_per_s for run in own]
    firsts = [run.first_token_s for run in own]
    return DecodeTimes(
        tokens_per_s=Spread.of(speeds),
        call_tokens_per_s=Spread.of(calls),
        first_token_s=Spread.of(firsts),
        kept=Spread.ratio(speeds, [run.tokens_per_s for run in plainly]),
        call_kept=Spread.ratio(calls, [run.call_tokens_per_s for run in plainly]),
        first_token_of_text=Spread.ratio(firsts, [run.first_token_s for run in text]) if text else None,
    )


def boundaries(runs: Sequence[Run]) -> Boundaries:
    """Summarise the recalls between chunks."""
    decoding = sum(run.decoding_s for run in runs)
    recalls = [phases for run in runs for phases in run.recalls]
    names = list(dict.fromkeys(name for phases in recalls for name in phases))
    following = [pair for run in runs for ids in run.ids for pair in pairwise(ids)]
    there = sum(len(after) for _, after in following)
    new = sum(len(set(after).difference(before)) for before, after in following)
    guesses, hits = sum(run.guesses for run in runs), sum(run.hits for run in runs)
    return Boundaries(
        chunks=sum(len(ids) for run in runs for ids in run.ids),
        late=sum(run.late for run in runs),
        waited=sum(phases.get("wait", 0.0) for phases in recalls) / decoding,
        recalling=sum(phases.get("recall", 0.0) for phases in recalls) / decoding,
        phases={name: statistics.median(phases.get(name, 0.0) for phases in recalls) for name in names},
        kept=(there - new) / there if there else 0.0,
        guesses=guesses,
        hit_rate=hits / guesses if guesses else 0.0,
        foreseen=hits / new if new else 0.0,
    )


def bound(contenders: Contenders, runs: Sequence[Run], size: int) -> Bound:
    """The bound on these runs, with ``size`` sequences at once."""
    spec, dtype = contenders.bank.manifest.spec, contenders.adapter.dtype
    tokens = statistics.fmean(run.memory_tokens for run in runs)
    read = 2 * spec.vectors_per_token * spec.head_dim * dtype.itemsize * tokens
    weights = contenders.baseline.weight_bytes
    return Bound(weights, tokens, read, weights / (weights + size * read))
