"""``m3 bench tiers``: each tier, and the whole path up, against plain reads, writes and copies of the same bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime import assembly
from m3runtime.config.schema import Config, TierConfig
from m3runtime.lab.bench.banks import bank_for
from m3runtime.lab.bench.every_tier import every_tier
from m3runtime.lab.bench.made import made_bank
from m3runtime.lab.bench.tier_runs import Contender, TierRuns
from m3runtime.lab.bench.timing import threads, timed
from m3runtime.lab.results import Result, Spread, environment
from m3runtime.observe.figures import show_size
from m3runtime.writing.writer import OnProgress

BATCHES = (1, 5, 32)
SIZES = (40_000, 400_000)
"""Bytes of the blocks of `bench_every_tier`."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The settings of ``m3 bench tiers``."""

    batches: tuple[int, ...] = BATCHES
    """Numbers of blocks in one call."""
    rounds: int = 15
    references: int = 64
    """Most references in the temporary bank of a corpus."""
    threads: int = 2
    block_bytes: int | None = None
    """Bytes of made blocks, of which there are ``references``; None: those of a bank."""


@dataclass(frozen=True, slots=True)
class TierTimes:
    """The times of one contender with one number of blocks."""

    name: str
    blocks: int
    bytes: float
    """Bytes of the blocks, mean over rounds."""
    seconds: Spread
    baseline: str
    """Name of the contender to compare with; a baseline names itself."""
    speed: Spread
    """The seconds of the baseline over its own, in the same round."""


@dataclass(frozen=True, slots=True)
class TierBench(Result):
    """The results of ``m3 bench tiers``."""

    settings: TierSettings
    device: str
    tiers: Sequence[str]
    """Names of the tiers, fastest first."""
    bank: str
    slot_bytes: int
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    has_cold: bool
    """True if the page cache could be emptied; otherwise there are no cold rows."""
    rows: Sequence[TierTimes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for blocks in dict.fromkeys(row.blocks for row in self.rows):
            rows = [row for row in self.rows if row.blocks == blocks]
            title = f"{blocks} block{'s' if blocks > 1 else ''}, {show_size(rows[0].bytes)}"
            table = Table("", "ms (quartiles)", "per second", "speed", title=title, box=None)
            for baseline in dict.fromkeys(row.baseline for row in rows):
                # Each baseline, and under it what is compared with it. The JSON has the quartiles of ratios: they would
                # not fit 80 columns.
                for row in sorted(
                    (row for row in rows if row.baseline == baseline), key=lambda row: row.name != baseline
                ):
                    own = row.name == baseline
                    table.add_row(
                        row.name if own else f"  {row.name}",
                        row.seconds.show_ms(),
                        show_size(row.bytes / row.seconds.median),
                        "" if own else f"{row.speed.median:.2f}",
                    )
            yield table
        cold = "" if self.has_cold else " (no cold rows: the page cache cannot be emptied here)"
        yield (
            f"{' > '.join(self.tiers)}, on {self.device}; {self.settings.threads} threads; "
            f"{self.settings.rounds} rounds; page cache warm{cold}; bank: {self.bank}; {environment()['machine']}"
        )


@dataclass(frozen=True, slots=True)
class TierBenches(Result):
    """The results of ``m3 bench tiers --all``, one for each size of blocks."""

    benches: Sequence[TierBench]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.benches


def bench_every_tier(
    config: Config,
    settings: TierSettings,
    sizes: Sequence[int],
    progress: OnProgress,
    *,
    url: str | None = None,
    valkey: str | None = None,
) -> TierBenches:
    """Measure each kind of tier and home that is installed, on made blocks of these sizes; see `every_tier`."""
    with every_tier(config, max(sizes), url, valkey) as (own, others):
        return TierBenches(
            [bench_tiers(own, [], replace(settings, block_bytes=size), progress, others) for size in sizes]
        )


def bench_tiers(
    config: Config,
    corpus: Sequence[Path],
    settings: TierSettings,
    progress: OnProgress,
    others: Mapping[str, TierConfig] = MappingProxyType({}),
) -> TierBench:
    """Measure on the configured bank, or on a temporary one of the corpus or of made blocks; each round reads others.

    A temporary folder is made next to the bank, also for tiers that keep files, and for ``others``: homes of other
    kinds, by the name that they get. Raises `InputError` if there is neither bank nor corpus.
    """
    made = settings.block_bytes
    with (
        threads(settings.threads),
        bank_for(config, None, corpus, settings.references, progress)
        if made is None
        else made_bank(config, made, settings.references, progress) as own,
        TierRuns(own, assembly.device(config), others) as runs,
    ):
        sizes = sorted({min(size, len(runs.ids)) for size in settings.batches})
        rows: list[TierTimes] = []
        for place, size in enumerate(sizes):
            done = place * (settings.rounds + 1)

            def begin(number: int, size: int = size, done: int = done) -> None:
                runs.draw(size, number)
                progress("Measuring times", done + number, len(sizes) * (settings.rounds + 1))

            runs.sizes.clear()
            contenders = runs.contenders(size)
            seconds = timed(
                {name: one.work for name, one in contenders.items()},
                settings.rounds,
                begin,
                {name: one.before for name, one in contenders.items() if one.before},
            )
            rows += _rows(contenders, seconds, size, sum(runs.sizes[1:]) / settings.rounds)
        progress("Measuring times", len(sizes) * (settings.rounds + 1), len(sizes) * (settings.rounds + 1))
        where = "temporary" if own is not config else str(config.bank)
        return TierBench(
            settings=settings,
            device=str(runs.device),
            tiers=[tier.name for tier in runs.hierarchy.tiers],
            bank=f"{where}, {len(runs.bank.home)} memories",
            slot_bytes=runs.slot_bytes,
            config=own.model_dump(mode="json"),
            fingerprints=runs.bank.manifest.fingerprints(),
            has_cold=runs.has_cold,
            rows=rows,
        )


def _rows(
    contenders: Mapping[str, Contender], seconds: Mapping[str, Sequence[float]], blocks: int, size: float
) -> list[TierTimes]:
    found = []
    for name, own in seconds.items():
        baseline = contenders[name].baseline
        found.append(TierTimes(name, blocks, size, Spread.of(own), baseline, Spread.ratio(seconds[baseline], own)))
    return found
