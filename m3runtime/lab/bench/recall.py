"""``m3 bench recall``: the time of a recall, phase by phase, as the number of memories in a bank grows."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.lab.bench.synthetic import Built, build, centres, queries
from m3runtime.lab.bench.timing import threads, turns, wait
from m3runtime.lab.results import Result, Spread, environment
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.writing.writer import OnProgress

SIZES = (1_000, 10_000, 100_000)
HUGE = 1_000_000
PARTS = ("embed", "search", "read", "decode", "deliver")
"""The phases of a recall for which nothing was prefetched."""
WHOLE, OURS = "recall", "recall without embedding"


@dataclass(frozen=True, slots=True)
class RecallSettings:
    """The settings of `bench_recall`."""

    sizes: tuple[int, ...] = SIZES
    """Memories of each synthetic bank."""
    rounds: int = 30
    """Texts that every bank is queried with."""
    memories: int = 5
    """Memories of one recall."""
    threads: int = 2


@dataclass(frozen=True, slots=True)
class RecallTimes:
    """The times of one kind of recall over one bank, in seconds."""

    name: str
    memories: int
    """Memories in the bank."""
    phases: Mapping[str, Spread]
    """The time of each of `PARTS`, of the whole recall (`WHOLE`) and of the recall without embedding (`OURS`)."""
    of_embedding: Mapping[str, Spread]
    """The time of each of these over the time of the embedding in the same recall."""

    @classmethod
    def of(cls, name: str, memories: int, recalls: Sequence[Mapping[str, float]]) -> "RecallTimes":
        """Sum up recalls that `timed_recall` measured."""
        phases = {phase: [one[phase] for one in recalls] for phase in (*PARTS, WHOLE, OURS)}
        ratios = {phase: Spread.ratio(of, phases["embed"]) for phase, of in phases.items() if phase != "embed"}
        return cls(name, memories, {phase: Spread.of(of) for phase, of in phases.items()}, ratios)


@dataclass(frozen=True, slots=True)
class RecallBench(Result):
    """The result of `bench_recall`."""

    settings: RecallSettings
    device: str
    config: Mapping[str, Any]
    embedder: str
    rows: Sequence[RecallTimes]
    built: Sequence[Built]
    growth: Mapping[str, Spread]
    """For `WHOLE` and `OURS`: the time over the largest bank, over the time over the smallest for the same text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield recall_table(self.rows)
        first, last = self.built[0], self.built[-1]
        for phase, growth in self.growth.items():
            yield f"{phase}: {growth.show(2)} times as long at {last.memories:,} as at {first.memories:,}"
        yield (
            f"{last.memories:,} memories were made in {last.home_s:.0f} s and indexed in {last.index_s:.0f} s; "
            f"on {self.device}; {self.settings.threads} threads; {self.settings.rounds} texts; no caching tiers, page "
            f"cache warm; {self.embedder}; {environment()['machine']}"
        )


def recall_table(rows: Sequence[RecallTimes]) -> Table:
    """The times of recalls as a table, one row for each."""
    title = "Milliseconds, median (quartiles); below it, the ratio to the embedding's time"
    table = Table("memories", *PARTS, WHOLE, title=title)
    for row in rows:
        cells = []
        for phase in (*PARTS, WHOLE):
            spread = row.phases[phase]
            ratio = f"\n{row.of_embedding[phase].median:.2f}" if phase in row.of_embedding else ""
            cells.append(f"{1e3 * spread.median:.2f} ({1e3 * spread.low:.2f} to {1e3 * spread.high:.2f}){ratio}")
        name = row.name if row.name == f"{row.memories:,}" else f"{row.name}, {row.memories:,}"
        table.add_row(name, *cells)
    return table


def bench_recall(config: Config, settings: RecallSettings, progress: OnProgress) -> RecallBench:
    """Measure recalls over synthetic banks in a temporary folder.

    No caching tier is used, and no memory stays decoded: each recall reads its blocks from the home.
    """
    config = measured(config, settings.memories)
    sizes = sorted(set(settings.sizes))
    with ExitStack() as opened:
        opened.enter_context(threads(settings.threads))
        embedder = assembly.open_embedder(config)
        opened.callback(embedder.close)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="m3-bench-")))
        runtimes: dict[int, Runtime] = {}
        about = centres(embedder)
        built: list[Built] = []
        for size in sizes:
            bank, how = build(config, embedder, about, folder / str(size), size, progress)
            opened.callback(bank.close)
            built.append(how)
            runtimes[size] = _open(opened, config, bank, embedder)
        texts = queries(settings.rounds + 1)
        found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
        every = settings.rounds + 1
        names = {f"{size:,}": size for size in sizes}
        for number, name in turns(list(names), settings.rounds, lambda done: progress("Recalling", done, every)):
            recalled, phases = timed_recall(runtimes[names[name]], texts[number])
            runtimes[names[name]].store.forget(recalled.ids)  # so that no later recall finds them decoded
            if number:
                found[names[name]].append(phases)
        progress("Recalling", every, every)
        small, large = found[sizes[0]], found[sizes[-1]]
        return RecallBench(
            settings=settings,
            device=str(assembly.device(config)),
            config=config.model_dump(mode="json"),
            embedder=f"{Path(config.embedder.path).name} ({embedder.fingerprint})",
            rows=[RecallTimes.of(f"{size:,}", size, phases) for size, phases in found.items()],
            built=built,
            growth={
                phase: Spread.ratio([one[phase] for one in large], [one[phase] for one in small])
                for phase in (WHOLE, OURS)
            },
        )


def measured(config: Config, memories: int) -> Config:
    """The configuration under which every recall delivers ``memories`` memories, whatever their scores."""
    recall = {"memories": memories, "min_score": -1.0, "margin": None, "when_late": "wait", "trace": None}
    return config.without_cold_start().model_copy(update={"recall": config.recall.model_copy(update=recall)})


def timed_recall(runtime: Runtime, text: str) -> tuple[Recalled, dict[str, float]]:
    """One recall of a new stream, and its seconds by phase: `PARTS`, `WHOLE` and `OURS`.

    Work that the recall started on an accelerator is waited for.
    """
    with runtime.stream() as stream:
        began = time.perf_counter()
        recalled = stream.recall(text)
        wait()
        whole = time.perf_counter() - began
    phases = {name: recalled.phases.get(name, 0.0) for name in PARTS}
    return recalled, {**phases, WHOLE: whole, OURS: whole - phases["embed"]}


def _open(opened: ExitStack, config: Config, bank: Bank, embedder: Embedder) -> Runtime:
    device = assembly.device(config)
    index, _ = assembly.bank_index(config, bank).open(cold=config.recall.cold_start)
    retriever = Retriever(embedder, index, memories=config.recall.memories)
    runtime = Runtime(config, bank, Hierarchy([], bank.home, bank.codecs, device), retriever, device)
    opened.callback(runtime.close)
    return runtime
