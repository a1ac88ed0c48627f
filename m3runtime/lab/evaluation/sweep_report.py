"""`sweep_report`: the results of ``m3 eval sweep`` as a report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.lab.evaluation.chunks import ChunkLength, chunk_lengths
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, mean
from m3runtime.lab.evaluation.sweep import Changes, SweepResults, SweepRun, SweepSettings, Tried
from m3runtime.lab.evaluation.trials import Trial, changed
from m3runtime.memory.spec import canonical_json
from m3runtime.writing.writer import OnProgress


def evaluate_sweep(config: Config, settings: SweepSettings, folder: Path, progress: OnProgress = silent) -> Report:
    """Run the sweep in a folder, or resume it; see `SweepRun`. Raises `InputError` if a corpus has too little text."""
    run = SweepRun(config, settings, folder)
    documents = list(read_documents([Path(path) for path in settings.corpus])) if settings.corpus else []
    adapter = assembly.open_adapter(config)
    results = run.run(adapter, progress)
    chunks: Sequence[ChunkLength] = ()
    if documents:
        found = changed(config, results.kept)
        reader = adapter.with_memory(found.memory)
        chunks = chunk_lengths(found, reader, documents, folder, passages=20, seed=settings.seed, progress=progress)
    return sweep_report(results, chunks, settings, run.config)


def sweep_report(
    results: SweepResults, chunks: Sequence[ChunkLength], settings: SweepSettings, config: Config
) -> Report:
    """The report: a table of all trials, plots, and the recommended settings with their reasons."""
    return Report(
        title=f"Sweep: {settings.questions} questions over {settings.references} references, setting by setting",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=tuple(_summary(results)),
        tables=(_tried(results, settings.seed), _text(results, settings.seed), *_chunk_table(chunks)),
        plots=tuple(_plots(results, chunks, settings.seed)),
        results={
            "none": results.none,
            "axes": {
                one.axis.name: [{"option": dict(tried.option), **asdict(tried.trial)} for tried in one.tried]
                for one in results.walked
            },
            "text": {str(count): trial for count, trial in results.text},
            "recommended": results.kept,
            "chunks": chunks,
        },
    )


def shown(option: Changes) -> str:
    """The value of an option, for people."""
    (value,) = option.values()
    if isinstance(value, dict):
        rest = [f"{name.removesuffix('_bytes')} {what}" for name, what in value.items() if name != "kind"]
        return ", ".join([str(value["kind"]), *rest])
    if isinstance(value, list):
        return f"{value[0]} to {value[-1]}"
    return "none" if value is None else str(value)


def _tried(results: SweepResults, seed: int) -> Table:
    rows: list[tuple[object, ...]] = [("", "no memory", *_figures(results.none, seed), "", "", "", "")]
    for one in results.walked:
        for number, tried in enumerate(one.tried):
            name = one.axis.name if number == 0 else ""
            if tried.refused:
                rows.append((name, shown(tried.option), tried.refused, "", "", "", "", ""))
                continue
            size = f"{tried.trial.bytes:,.0f}" if one.axis.name in ("tokens per head", "layers", "codec") else ""
            kept = "**kept**" if number == one.kept else ""
            rows.append((name, shown(tried.option), *_figures(tried.trial, seed), *_behind(tried), size, kept))
    return Table(
        "Everything that was tried",
        ("setting", "value", "exact", "log-likelihood", "less exact", "less likely", "bytes of a memory", ""),
        tuple(rows),
        "From top to bottom; each setting is tried with what was kept above it, memories unquantised until the codec. "
        "*Less exact*: how far behind the most exact value, question by question; *less likely*: behind the likeliest "
        "of those that are not told from the most exact. Kept is the first value that is told from neither.",
    )


def _behind(tried: Tried) -> tuple[object, object]:
    def of(estimate: Estimate) -> object:
        return estimate if estimate.value or estimate.high else "best"

    return of(tried.less_exact), of(tried.less_likely)


def _figures(trial: Trial, seed: int) -> tuple[Estimate, Estimate]:
    return mean(trial.right, seed), mean(trial.log_probs, seed)


def _text(results: SweepResults, seed: int) -> Table:
    rows = [(count, *_figures(trial, seed), f"{trial.recalled:.1f}") for count, trial in results.text]
    return Table(
        "The same questions with references as text in the prompt",
        ("references at most", "exact answers", "log-likelihood", "references in a prompt"),
        tuple(rows),
        "Under the recommended rules of recall and the recommended prompt.",
    )


def _chunk_table(chunks: Sequence[ChunkLength]) -> tuple[Table, ...]:
    if not chunks:
        return ()
    rows = tuple((one.tokens, one.alone, one.memory, one.gain, one.recalls) for one in chunks)
    return (
        Table(
            "Chunk length, on real text",
            ("tokens of a chunk", "alone", "with memory", "more than alone", "recalls for a passage"),
            rows,
            "Log-likelihood of a token of held-out passages; see `m3 eval text`. Passages begin with a prompt of one "
            "chunk, so compare the differences.",
        ),
    )


def _summary(results: SweepResults) -> list[str]:
    recommended = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in results.kept.items())
    lines = [f"Recommended: {recommended}."]
    for one in results.walked:
        able = [tried for tried in one.tried if not tried.refused]
        kept = one.tried[one.kept]
        others = ", ".join(
            f"{shown(tried.option)} {fmean(tried.trial.right):.3f} and {fmean(tried.trial.log_probs):.3f}"
            for tried in able
            if tried is not kept
        )
        lines.append(
            f"{one.axis.name}: **{shown(kept.option)}**, exact {fmean(kept.trial.right):.3f} and log-likelihood "
            f"{fmean(kept.trial.log_probs):.3f}; {others}."
        )
    return lines


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def _plots(results: SweepResults, chunks: Sequence[ChunkLength], seed: int) -> list[Plot]:
    plots = []
    for one in results.walked:
        able = [tried for tried in one.tried if not tried.refused]
        name = one.axis.name.replace(" ", "-")
        if one.axis.name == "codec":
            x = tuple(tried.trial.bytes / 1024 for tried in able)
            likely = tuple(mean(tried.trial.log_probs, seed) for tried in able)
            plots.append(Plot(name, "Codec", "log-likelihood", (Series("memory", likely, x),), x="KiB of a memory"))
            continue
        labels = tuple(shown(tried.option) for tried in able)
        series = [Series("memory", tuple(mean(tried.trial.log_probs, seed) for tried in able))]
        if one.axis.name == "memories":
            series.append(Series("text", tuple(mean(trial.log_probs, seed) for _, trial in results.text)))
        plots.append(Plot(name, one.axis.name.capitalize(), "log-likelihood", tuple(series), labels))
    if chunks:
        labels = tuple(str(one.tokens) for one in chunks)
        gains = (Series("memory", tuple(one.gain for one in chunks)),)
        plots.append(Plot("chunk-length", "Chunk length, real text", "more than alone", gains, labels))
    return plots
