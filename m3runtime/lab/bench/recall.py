"""``m3 bench recall``: how long a recall takes, stage by stage, over banks of a thousand memories and of many more."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.lab.bench.synthetic import Built, build, centres, queries
from m3runtime.lab.bench.timing import Spread, threads, turns
from m3runtime.lab.evaluation.report import environment, plain
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.writing.writer import OnProgress

SIZES = (1_000, 10_000, 100_000)
HUGE = 1_000_000
CONFIGURED = "configured bank"
PARTS = ("embed", "search", "read", "decode", "deliver")
"""The stages that a recall is made of here, where nothing is brought ahead."""
WHOLE, OURS = "recall", "recall without embedding"


@dataclass(frozen=True, slots=True)
class RecallSettings:
    """What is measured, and how often."""

    sizes: tuple[int, ...] = SIZES
    rounds: int = 30
    """Texts that every bank is asked for."""
    memories: int = 5
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One bank."""

    name: str
    memories: int
    stages: Mapping[str, Spread]
    """`PARTS`, `WHOLE` and `OURS`."""
    of_embedding: Mapping[str, Spread]
    """Of each other stage, its time over that of the embedding in the same recall."""


@dataclass(frozen=True, slots=True)
class RecallBench:
    """All that was measured."""

    settings: RecallSettings
    device: str
    config: Mapping[str, Any]
    embedder: str
    rows: Sequence[Row]
    built: Sequence[Built]
    growth: Mapping[str, Spread]
    """Of `WHOLE` and `OURS`: time over the largest synthetic bank, over that of the smallest for the same text."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**plain(asdict(self)), "environment": environment()}


def bench_recall(config: Config, settings: RecallSettings, progress: OnProgress) -> RecallBench:
    """Measure over synthetic banks in a temporary folder, and over the configured one if it is there.

    No caching tier is used: every recall reads its blocks from the home, and decodes them.
    """
    recall = {"memories": settings.memories, "min_score": -1.0, "margin": None, "when_late": "wait", "trace": None}
    config = config.without_cold_start()
    config = config.model_copy(update={"recall": config.recall.model_copy(update=recall)})
    sizes = sorted(set(settings.sizes))
    with ExitStack() as opened:
        opened.enter_context(threads(settings.threads))
        embedder = assembly.open_embedder(config)
        opened.callback(embedder.close)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="m3-bench-")))
        runtimes: dict[str, Runtime] = {}
        about = centres(embedder)
        built: list[Built] = []
        for size in sizes:
            bank, how = build(config, embedder, about, folder / str(size), size, progress)
            opened.callback(bank.close)
            built.append(how)
            runtimes[f"{size:,}"] = _open(opened, config, bank, embedder)
        if Bank.exists(config.bank, assembly.open_home(config, read_only=True)):
            bank = assembly.open_bank(config, read_only=True)
            opened.callback(bank.close)
            bank.manifest.check_embedder(embedder=embedder.fingerprint, name=config.embedder.path, where=bank.path)
            runtimes[CONFIGURED] = _open(opened, config, bank, embedder)
        texts = queries(settings.rounds + 1)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runtimes}
        all_rounds = settings.rounds + 1
        for number, name in turns(list(runtimes), settings.rounds, lambda done: progress("recall", done, all_rounds)):
            stages = _recall(runtimes[name], texts[number])
            if number:
                found[name].append(stages)
        progress("recall", all_rounds, all_rounds)
        least, most = (found[f"{size:,}"] for size in (sizes[0], sizes[-1]))
        return RecallBench(
            settings=settings,
            device=str(assembly.device(config)),
            config=config.model_dump(mode="json"),
            embedder=f"{Path(config.embedder.path).name} ({embedder.fingerprint})",
            rows=[_row(name, len(runtimes[name].bank.home), stages) for name, stages in found.items()],
            built=built,
            growth={
                stage: Spread.of([large[stage] / small[stage] for small, large in zip(least, most, strict=True)])
                for stage in (WHOLE, OURS)
            },
        )


def _open(opened: ExitStack, config: Config, bank: Bank, embedder: Embedder) -> Runtime:
    device = assembly.device(config)
    index, _ = assembly.bank_index(config, bank).open(cold=config.recall.cold_start)
    retriever = Retriever(embedder, index, memories=config.recall.memories)
    runtime = Runtime(config, bank, Hierarchy([], bank.home, bank.stamp, device), retriever, device)
    opened.callback(runtime.close)
    return runtime


def _recall(runtime: Runtime, text: str) -> dict[str, float]:
    """Seconds of each stage of one recall, of a stream that holds nothing."""
    with runtime.stream() as stream:
        stages = dict(stream.recall(text).stages)
    found = {name: stages.get(name, 0.0) for name in (*PARTS, WHOLE)}
    return found | {OURS: found[WHOLE] - found["embed"]}


def _row(name: str, memories: int, recalls: Sequence[Mapping[str, float]]) -> Row:
    stages = {stage: Spread.of([one[stage] for one in recalls]) for stage in (*PARTS, WHOLE, OURS)}
    others = {
        stage: Spread.of([one[stage] / one["embed"] for one in recalls]) for stage in (*PARTS, OURS) if stage != "embed"
    }
    return Row(name, memories, stages, others)
