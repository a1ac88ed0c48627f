"""``m3 bench index``: recalls from many made references in the configured home and index, against usearch over few."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime import assembly
from m3runtime.config.schema import Config, EmbedderConfig, IndexConfig, TierConfig
from m3runtime.errors import InputError
from m3runtime.lab.bench.bank_server import BankServer, MadeEmbedder, Opened, RecallTime, centres_of
from m3runtime.lab.bench.recall import measured
from m3runtime.lab.bench.synthetic import Built, build
from m3runtime.lab.results import Result, environment
from m3runtime.storage.opening import HOME
from m3runtime.writing.writer import OnProgress

CONFIGURED, BASELINE = "configured", "usearch over lmdb"
_RESAMPLED = 1000


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """The settings of `bench_index`."""

    references: int = 1_000_000
    baseline: int = 100_000
    """References of `BASELINE`."""
    dim: int = 64
    queries: int = 1000
    memories: int = 5
    """Memories of one recall."""
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Served:
    """A bank, and a process that recalled from it."""

    name: str
    memories: int
    """Memories in the bank."""
    built: Built | None
    """None for a bank that was there already."""
    stored_bytes: int
    opened: Opened
    peak_bytes: int
    """Most memory that it had in the end."""
    recall_s: Mapping[str, float]
    """Seconds of a recall, without the embedding of its text: p50, p90 and p99."""
    search_s: Mapping[str, float]
    """Seconds of the search in a recall: p50, p90 and p99."""
    cpu_s: float
    """Mean CPU time of a recall, of all threads."""
    found: float
    """Share of the nearest memories that the recalls delivered."""

    @classmethod
    def of(
        cls,
        name: str,
        config: Config,
        built: Built | None,
        server: BankServer,
        recalls: Sequence[RecallTime],
        nearest: npt.NDArray[np.uint64],
    ) -> "Served":
        """Let a server end, and sum up."""
        peak = server.end()
        found = [len({*one.ids} & {*right}) / len(right) for one, right in zip(recalls, nearest.tolist(), strict=True)]
        with closing(assembly.open_bank(config, read_only=True)) as bank:
            memories, stored = len(bank.home), bank.home.stored_bytes()
        return cls(
            name=name,
            memories=memories,
            built=built,
            stored_bytes=stored,
            opened=server.opened,
            peak_bytes=peak,
            recall_s=_percentiles([one.recall_s for one in recalls]),
            search_s=_percentiles([one.search_s for one in recalls]),
            cpu_s=float(np.mean([one.cpu_s for one in recalls])),
            found=float(np.mean(found)),
        )


@dataclass(frozen=True, slots=True)
class IndexBench(Result):
    """The result of `bench_index`."""

    settings: IndexSettings
    config: Mapping[str, Any]
    rows: Sequence[Served]
    ratios: Mapping[str, Sequence[float]]
    """For each percentile: `CONFIGURED` over `BASELINE`, and the limits of 95 % of those of resampled queries."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        memories = self.settings.memories
        title = "Milliseconds: p50, p90, p99. Memory: before the bank was opened, and at most"
        table = Table("bank", "memories", "opening", "MB", "search", "recall", "CPU", f"of {memories}", title=title)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.memories:,}",
                f"{row.opened.seconds:.2f} s\n{row.opened.cpu_s:.2f} CPU",
                f"{row.opened.before_bytes / 1e6:.0f}\n{row.peak_bytes / 1e6:.0f}",
                *("\n".join(f"{1e3 * one:.2f}" for one in times.values()) for times in (row.search_s, row.recall_s)),
                f"{1e3 * row.cpu_s:.2f}",
                f"{row.found:.4f}",
            )
        yield table
        for row in self.rows:
            if built := row.built:
                yield (
                    f"{row.name}: {row.stored_bytes / 1e6:.0f} MB; written in {built.home_s:.0f} s, compacted in "
                    f"{built.compaction_s:.0f}, indexed in {built.index_s:.0f}; CPU {built.home_cpu_s:.0f}, "
                    f"{built.compaction_cpu_s:.0f} and {built.index_cpu_s:.0f} s"
                )
        for name, (ratio, low, high) in self.ratios.items():
            yield f"{name}: {ratio:.2f} ({low:.2f} to {high:.2f}) times {BASELINE}"
        yield (
            f"{self.settings.queries} recalls of {memories} memories; {self.settings.dim} numbers; "
            f"{self.settings.threads} threads; page cache as it is; {environment()['machine']}"
        )


def bench_index(config: Config, settings: IndexSettings, folder: Path | None, progress: OnProgress) -> IndexBench:
    """Measure both banks, each served by a process of its own that recalls while the other one waits.

    Banks are kept in ``folder`` and used again, or made in a temporary one. Raises `InputError` if one of them has
    another size.
    """
    config = measured(config, settings.memories).model_copy(
        update={
            "embedder": EmbedderConfig.model_validate(
                {"kind": f"{MadeEmbedder.__module__}:{MadeEmbedder.__name__}", "path": "made", "dim": settings.dim}
            ),
            "tiers": (config.tiers or (HOME,))[-1:],
            "metrics": config.metrics.model_copy(update={"port": None}),
        }
    )
    baseline = {"index": IndexConfig(), "tiers": (TierConfig(kind="lmdb"),)}
    with ExitStack() as opened:
        where = folder or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="m3-bench-")))
        configs = {
            CONFIGURED: (config.model_copy(update={"bank": where / "configured"}), settings.references),
            BASELINE: (config.model_copy(update={"bank": where / "baseline", **baseline}), settings.baseline),
        }
        built = {name: _made(*wanted, progress) for name, wanted in configs.items()}
        nearest = {name: _nearest(one, settings, progress) for name, (one, _) in configs.items()}
        servers = {name: opened.enter_context(BankServer(one, settings.threads)) for name, (one, _) in configs.items()}
        asked: dict[str, list[RecallTime]] = {name: [] for name in configs}
        for server in servers.values():
            server.recall(settings.queries)  # a first recall is not counted
        for number in range(settings.queries):
            progress("Recalling", number, settings.queries)
            for name in list(configs) if number % 2 else reversed(configs):
                asked[name].append(servers[name].recall(number))
        progress("Recalling", settings.queries, settings.queries)
        rows = [
            Served.of(name, one, built[name], servers[name], asked[name], nearest[name])
            for name, (one, _) in configs.items()
        ]
    ratios: dict[str, list[float]] = {}
    for part in ("search", "recall"):
        ours, theirs = (np.array([getattr(recall, f"{part}_s") for recall in asked[name]]) for name in configs)
        ratios |= {f"{part}, p{percent}": _ratio(ours, theirs, percent) for percent in (50, 99)}
    return IndexBench(settings=settings, config=config.model_dump(mode="json"), rows=rows, ratios=ratios)


def _made(config: Config, count: int, progress: OnProgress) -> Built | None:
    """Make a bank, unless it is there."""
    if config.bank.exists():
        with closing(assembly.open_bank(config, read_only=True)) as bank:
            found = len(bank.home)
        if found != count:
            raise InputError(f"{config.bank}: it has {found} memories, not {count}; remove it, or name another folder")
        return None
    config.bank.parent.mkdir(parents=True, exist_ok=True)
    embedder = assembly.open_embedder(config)
    bank, built = build(config, embedder, centres_of(embedder.dim), config.bank, count, progress, compact=True)
    bank.close()
    return built


def _nearest(config: Config, settings: IndexSettings, progress: OnProgress) -> npt.NDArray[np.uint64]:
    """The nearest ids to each query, by comparing all: ``uint64[queries, memories]``."""
    queries = MadeEmbedder("", dim=settings.dim).embed_queries([f"query {one}" for one in range(settings.queries)])
    ids, scores = np.zeros((len(queries), 0), np.uint64), np.zeros((len(queries), 0), np.float32)
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        done, every = 0, len(bank.home)
        for some, vectors in bank.home.embeddings():
            scores = np.concatenate([scores, queries @ vectors.T], 1)
            ids = np.concatenate([ids, np.broadcast_to(some, (len(queries), len(some)))], 1)
            wanted = min(settings.memories, scores.shape[1])
            best = np.argpartition(-scores, wanted - 1, 1)[:, :wanted]
            ids, scores = np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)
            done += len(some)
            progress("Comparing all", done, every)
    return ids


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(seconds, percent)) for percent in (50, 90, 99)}


def _ratio(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], percent: int) -> list[float]:
    """The ratio of two percentiles, and the limits of 95 % of those of resampled queries."""
    drawn = np.random.default_rng(0).integers(0, len(ours), (_RESAMPLED, len(ours)))
    ratios = np.percentile(ours[drawn], percent, 1) / np.percentile(theirs[drawn], percent, 1)
    own = np.percentile(ours, percent) / np.percentile(theirs, percent)
    return [float(own), *map(float, np.percentile(ratios, [2.5, 97.5]))]
