"""`Contenders`: the ways to decode that ``m3 bench decode`` compares."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from m3runtime import assembly
from m3runtime.adapters.answers import Answer, Form, Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.lab.bench.comparison import Comparable
from m3runtime.lab.bench.timing import wait
from m3runtime.observe.metrics import Event
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy

PLAIN = "generate, no memory"
TEXT = "generate, references as text"
BARE = "ours, no runtime"
NOTHING = "ours, nothing recalled"
MEMORIES = "ours, memories"
WITHOUT_LOOKAHEAD = "ours, memories, no lookahead"
KINDS = (PLAIN, TEXT, BARE, NOTHING, MEMORIES, WITHOUT_LOOKAHEAD)

_ABOVE_ALL = 2.0
"""A score that none reaches."""


@dataclass(frozen=True, slots=True)
class Run:
    """One call of a contender."""

    tokens: tuple[tuple[int, ...], ...]
    """Tokens of each sequence."""
    first_token_s: float
    seconds: float
    """Seconds of the whole call."""
    recalls: tuple[Mapping[str, float], ...] = ()
    """Seconds of each phase of each recall at the end of a chunk, while decoding."""
    ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """For each sequence, the ids that each chunk read, from the last chunk of the prompt on."""
    late: int = 0
    guesses: int = 0
    hits: int = 0
    memory_tokens: float = 0.0
    """Mean number of memory tokens that a step of a sequence attends to."""

    @property
    def decoding_s(self) -> float:
        """Seconds from the first token to the last."""
        return self.seconds - self.first_token_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first token of each sequence."""
        return sum(len(row) - 1 for row in self.tokens) / self.decoding_s

    @property
    def call_tokens_per_s(self) -> float:
        """Tokens per second over the whole call."""
        return sum(map(len, self.tokens)) / self.seconds


class Contenders:
    """All ways to decode, on one loaded model and one open bank. One run at a time."""

    def __init__(self, config: Config, adapter: Adapter, *, timeline: int) -> None:
        """``timeline`` is the number of events to keep for a picture. Raises what opening the bank raises."""
        assert isinstance(adapter, Comparable)
        self.config = config = config.without_cold_start()
        self.adapter = adapter
        self.baseline = adapter.baseline()
        self._endless = self.baseline.endless()
        self._variants: dict[str, tuple[str, int]] = {}
        with ExitStack() as opening:
            self.bank = assembly.open_bank(config, read_only=True)
            opening.callback(self.bank.close)
            adapter.check(self.bank.manifest, self.bank.path)
            self._embedder = assembly.open_embedder(config)
            opening.callback(self._embedder.close)
            self.bank.manifest.check_embedder(
                embedder=self._embedder.fingerprint, name=config.embedder.path, where=self.bank.path
            )
            self._index, _ = assembly.bank_index(config, self.bank).open(cold=config.recall.cold_start)
            tiers = assembly.open_tiers(config, self.bank.slot_bytes, adapter.device, identity=self.bank.identity)
            self._tiers = Hierarchy(tiers, self.bank.home, self.bank.codecs, adapter.device)
            opening.callback(self._tiers.close)
            ahead = {"lookahead_tokens": config.recall.lookahead_tokens or config.recall.chunk_tokens // 4}
            bare = Hierarchy([], self.bank.home, self.bank.codecs, adapter.device)
            self._runtimes = {
                NOTHING: self._runtime(opening, self._tiers, {**ahead, "min_score": _ABOVE_ALL}),
                MEMORIES: self._runtime(opening, self._tiers, ahead),
                WITHOUT_LOOKAHEAD: self._runtime(opening, self._tiers, {"lookahead_tokens": 0}),
            }
            waiting = {**ahead, "when_late": "wait"}
            self._waiting = {
                "with lookahead": self._runtime(opening, self._tiers, waiting),
                "without lookahead": self._runtime(opening, self._tiers, {**waiting, "lookahead_tokens": 0}),
                "without caching tiers": self._runtime(opening, bare, waiting),
            }
            self._drawn = self._runtime(opening, self._tiers, ahead, timeline)
            self._open = opening.pop_all()

    def _runtime(
        self, opening: ExitStack, hierarchy: Hierarchy, recall: Mapping[str, object], timeline: int = 0
    ) -> Runtime:
        changes = {
            "recall": self.config.recall.model_copy(update=recall),
            "metrics": self.config.metrics.model_copy(update={"timeline": timeline}),
        }
        config = self.config.model_copy(update=changes)
        rules = config.recall
        retriever = Retriever(self._embedder, self._index, memories=rules.memories, min_score=rules.min_score)
        runtime = Runtime(config, self.bank, hierarchy, retriever, self.adapter.device)
        opening.callback(runtime.close)
        return runtime

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def texts(self) -> list[str]:
        """The texts of the bank's references."""
        return [one.text for one in self.bank.home.references(self.bank.home.ids()) if one is not None]

    @property
    def form(self) -> Form:
        """The form of prompts: plain, unless memories stand inside the chat template."""
        return "chat" if self.config.memory.place == "turn" else "plain"

    def with_text(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same prompts, each with the references that it recalls as text."""
        runtime, found = self._runtimes[MEMORIES], []
        questions = [prompt.query or prompt.text for prompt in prompts]
        for question, matches in zip(questions, runtime.search(questions), strict=True):
            references = runtime.references([match.id for match in matches])
            found.append(self.adapter.render(question, self.form, [one.text for one in references if one]))
        return found

    # -- the baseline -------------------------------------------------------------------------------------------

    def room(self, batches: Sequence[Sequence[Prompt]], new_tokens: int) -> int:
        """Tokens that a cache must have room for, for any of these batches."""
        longest = max(self.adapter.count_tokens(prompt.text) for some in batches for prompt in some)
        return longest + 1 + new_tokens  # one for BOS

    def try_variant(self, prompts: Sequence[Prompt], new_tokens: int, variant: str, room: int) -> float | str:
        """Tokens per second of one call, or the reason why the variant cannot run here."""
        try:
            run = self.baseline.generate(prompts, new_tokens, variant, room)
        except (RuntimeError, ValueError, ImportError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        return len(prompts) * new_tokens / run.seconds

    def choose(self, kind: str, variant: str, room: int) -> None:
        """Set the variant of `PLAIN` or `TEXT`."""
        self._variants[kind] = variant, room

    # -- runs ---------------------------------------------------------------------------------------------------

    def cool(self) -> None:
        """Empty the caching tiers and the stores of decoded memories."""
        ids = self.bank.home.ids()
        for runtime in (*self._runtimes.values(), *self._waiting.values(), self._drawn):
            runtime.store.forget(ids.tolist())
        for tier in self._tiers.tiers[:-1]:
            tier.discard(ids)

    def run(self, kind: str, prompts: Sequence[Prompt], new_tokens: int) -> Run:
        """One greedy call without an early end."""
        if kind in self._variants:
            plain = self.baseline.generate(prompts, new_tokens, *self._variants[kind])
            return Run(plain.tokens, plain.first_token_s, plain.seconds)
        return self._generate(self._runtimes.get(kind), prompts, new_tokens)

    def same_tokens(self, prompts: Sequence[Prompt], new_tokens: int) -> dict[str, bool]:
        """True for each way that gives the same tokens and memories, if late blocks are waited for."""
        found = {}
        for name, runtime in self._waiting.items():
            self.cool()
            found[name] = self._generate(runtime, prompts, new_tokens)
        wanted = found.pop("with lookahead")
        return {name: (run.tokens, run.ids) == (wanted.tokens, wanted.ids) for name, run in found.items()}

    def timeline(self, prompts: Sequence[Prompt], new_tokens: int) -> tuple[Run, list[Event]]:
        """One run of `MEMORIES` and its events, with chunks; times are seconds from its begin."""
        self._generate(self._drawn, prompts, min(new_tokens, 8))  # warm up
        self.cool()
        began = time.perf_counter()
        run = self._generate(self._drawn, prompts, new_tokens)
        ended = time.perf_counter()
        events = [event for event in self._drawn.timeline() if event.start >= began]
        recalls = sorted((event.start, event.end) for event in events if event.name == "recall")
        ends = [*(start for start, _ in recalls[1:]), ended]
        events += [Event("chunk", start, end, "decoding", ()) for (_, start), end in zip(recalls, ends, strict=True)]
        return run, [
            Event(one.name, one.start - began, one.end - began, one.thread, one.streams, one.blocks) for one in events
        ]

    def _generate(self, runtime: Runtime | None, prompts: Sequence[Prompt], new_tokens: int) -> Run:
        settings = GenerateConfig(max_new_tokens=new_tokens)
        with ExitStack() as closing:
            streams = None
            if runtime is not None:
                runtime.retriever.clear()  # no embedding of an earlier run is reused
                before = runtime.metrics().lookahead
                streams = [closing.enter_context(runtime.stream(self.adapter.dtype)) for _ in prompts]
            began = time.perf_counter()
            answers = self._endless.generate(prompts, streams, settings)
            wait()
            seconds = time.perf_counter() - began
        tokens, first = tuple(answer.tokens for answer in answers), answers[0].first_token_s
        if runtime is None:
            return Run(tokens, first, seconds)
        after = runtime.metrics().lookahead
        read = [self._chunks(answer, new_tokens) for answer in answers]
        return Run(
            tokens,
            first,
            seconds,
            recalls=tuple(chunk.phases for chunk in read[0][1:]),
            ids=tuple(tuple(chunk.ids for chunk in row) for row in read),
            late=sum(len(chunk.late) for answer in answers for chunk in answer.chunks),
            guesses=after.guesses - before.guesses,
            hits=after.hits - before.hits,
            memory_tokens=sum(self._attended(row, new_tokens) for row in read) / len(read),
        )

    def _chunks(self, answer: Answer, new_tokens: int) -> Sequence[Recalled]:
        """The memories that decoding reads, by chunk; the first were recalled for the last chunk of the prompt."""
        return answer.chunks[-math.ceil(new_tokens / self.config.recall.chunk_tokens) :]

    def _attended(self, chunks: Sequence[Recalled], new_tokens: int) -> float:
        """Mean number of memory tokens over the steps after the first token."""
        size = self.config.recall.chunk_tokens
        steps = [min((place + 1) * size, new_tokens) - max(1, place * size) for place in range(len(chunks))]
        return sum(count * chunk.tokens for count, chunk in zip(steps, chunks, strict=True)) / max(1, sum(steps))
