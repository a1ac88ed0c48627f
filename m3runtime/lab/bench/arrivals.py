"""``m3 bench arrivals``: requests that come at random moments against the same requests started together."""

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.adapters.engine import End, Event, Failure, Request
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.errors import InputError
from m3runtime.lab.bench.banks import bank_for
from m3runtime.lab.bench.comparison import Comparable
from m3runtime.lab.bench.decode import PROMPT_TOKENS, draw_prompts, measured
from m3runtime.lab.bench.timing import threads, turns
from m3runtime.lab.results import Result, Spread, environment
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

ALONE = "one after the other"
TOGETHER = "together"
ARRIVING = "arriving"


@dataclass(frozen=True, slots=True)
class ArrivalSettings:
    """The settings of ``m3 bench arrivals``."""

    requests: int = 8
    new_tokens: int = 128
    spread: float = 0.1
    """The moments of arrival lie in so much of the time that all take together."""
    rounds: int = 5
    memories: int = 5
    references: int = 128
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ArrivalTimes:
    """The times of one way to come."""

    tokens_per_s: Spread
    """Tokens of all requests over the seconds from the first arrival to the last answer."""
    first_token_s: Spread
    """Mean seconds from a request's arrival to its first token."""
    kept: Spread
    """``tokens_per_s`` over the figure of `TOGETHER` in the same round."""


@dataclass(frozen=True, slots=True)
class ArrivalBench(Result):
    """The results of ``m3 bench arrivals``."""

    settings: ArrivalSettings
    model: str
    device: str
    contenders: dict[str, ArrivalTimes]
    same_tokens: bool
    """Did every request get the same tokens in all ways and rounds?"""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("", "tokens/s", "of together", "first token, s")
        for name, one in self.contenders.items():
            table.add_row(name, one.tokens_per_s.show(1), one.kept.show(3), one.first_token_s.show(3))
        yield table
        settings = self.settings
        yield "the same tokens in all ways" if self.same_tokens else "OTHER TOKENS"
        yield (
            f"{self.model} on {self.device}; {settings.threads} threads; {settings.requests} requests of "
            f"{settings.new_tokens} tokens, arriving within {settings.spread:.0%} of the time that they take together; "
            f"{settings.rounds} rounds; {environment()['machine']}"
        )


def bench_arrivals(
    config: Config, adapter: Adapter, corpus: Sequence[Path], settings: ArrivalSettings, progress: OnProgress
) -> ArrivalBench:
    """Measure the same requests in all ways, in turns. Each reads memories of its own.

    Raises `InputError` if the adapter has no baseline, or there is neither bank nor corpus.
    """
    if not isinstance(adapter, Comparable):
        raise InputError(f"model.adapter: {type(adapter).__name__} has no baseline to compare with")
    endless, random_moments = adapter.baseline().endless(), random.Random(settings.seed)
    runs: dict[str, list[tuple[float, list[Answer]]]] = {name: [] for name in (TOGETHER, ARRIVING, ALONE)}
    with threads(settings.threads), bank_for(config, adapter, corpus, settings.references, progress) as own:
        waiting = measured(own, settings.memories)
        recall = waiting.recall.model_copy(update={"when_late": "wait"})  # or tokens would depend on the moment
        with Runtime.open(waiting.model_copy(update={"recall": recall}), read_only=True) as runtime:
            texts = [one.text for one in runtime.bank.home.references(runtime.bank.home.ids()) if one is not None]
            prompts = draw_prompts(adapter, texts, PROMPT_TOKENS, settings.seed)[: settings.requests]
            together_s = 1.0
            for number, name in turns(list(runs), settings.rounds, lambda n: progress("Arrivals", n, settings.rounds)):
                last = settings.spread * together_s
                moments = sorted(random_moments.uniform(0, last) for _ in prompts)
                run = _run(endless, runtime, prompts, settings.new_tokens, name, [m - moments[0] for m in moments])
                if name == TOGETHER:
                    together_s = run[0]
                if number:
                    runs[name].append(run)
    total = len(prompts) * settings.new_tokens
    speeds = {name: [total / seconds for seconds, _ in some] for name, some in runs.items()}
    tokens = {tuple(answer.tokens for answer in answers) for some in runs.values() for _, answers in some}
    return ArrivalBench(
        settings=settings,
        model=adapter.name,
        device=str(adapter.device),
        contenders={
            name: ArrivalTimes(
                tokens_per_s=Spread.of(speeds[name]),
                first_token_s=Spread.of(
                    [sum(answer.first_token_s for answer in answers) / len(answers) for _, answers in some]
                ),
                kept=Spread.ratio(speeds[name], speeds[TOGETHER]),
            )
            for name, some in runs.items()
        },
        same_tokens=len(tokens) == 1,
    )


def _run(
    adapter: Adapter, runtime: Runtime, prompts: Sequence[Prompt], new_tokens: int, way: str, moments: Sequence[float]
) -> tuple[float, list[Answer]]:
    """Seconds from the first request to the last answer, and the answers."""
    ended = [threading.Event() for _ in prompts]
    last: dict[int, Event] = {}

    def hear(index: int, event: Event) -> None:
        if isinstance(event, End | Failure):
            last[index] = event
            ended[index].set()

    with ExitStack() as closing:
        streams = [closing.enter_context(runtime.stream(adapter.dtype)) for _ in prompts]
        settings = GenerateConfig(max_new_tokens=new_tokens)
        requests = [Request(prompt, settings, stream) for prompt, stream in zip(prompts, streams, strict=True)]
        began = time.perf_counter()
        if way == TOGETHER:
            adapter.engine.submit(requests, hear)
        else:
            for index, (request, moment) in enumerate(zip(requests, moments, strict=True)):
                if way == ARRIVING:
                    time.sleep(max(0.0, began + moment - time.perf_counter()))
                adapter.engine.submit([request], lambda _, event, index=index: hear(index, event))  # type: ignore[misc]
                if way == ALONE:
                    ended[index].wait()
        for one in ended:
            one.wait()
        seconds = time.perf_counter() - began
    answers = []
    for _, event in sorted(last.items()):
        if isinstance(event, Failure):
            raise event.error
        assert isinstance(event, End)
        answers.append(event.answer)
    return seconds, answers
