"""`attention_report`: the results of ``m3 eval calibrate-attention``, and what they say to set."""

from dataclasses import asdict

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.attention import (
    AXES,
    AttentionResults,
    AttentionSettings,
    Reading,
    calibrate_attention,
)
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.writing.writer import OnProgress


def evaluate_attention(config: Config, settings: AttentionSettings, progress: OnProgress = silent) -> Report:
    """Calibrate, see `calibrate_attention`, and report."""
    results = calibrate_attention(config, settings, lambda: assembly.open_adapter(config), progress)
    return attention_report(results, settings, config)


def attention_report(results: AttentionResults, settings: AttentionSettings, config: Config) -> Report:
    """The report, whose last line of the summary is to be written into the configuration."""
    former, advised, seed = results.former, results.advised, settings.seed
    count = len(results.tried[former])
    rows = [
        (*_cells(reading), mean(values, seed), difference(values, results.tried[former], seed))
        for reading, values in results.tried.items()
    ]
    walked = [
        (
            one.axis,
            *(f"{getattr(reading, one.axis):g}" for reading in (*one.by_halves, one.by_all, one.kept)),
            one.gained,
        )
        for one in results.steps
    ]
    lines = [
        f"{one.axis}: what the references say has a log-likelihood that is {one.gained} higher with the value that "
        f"other statements choose, so {getattr(one.kept, one.axis):g} is kept"
        for one in results.steps
    ]
    lines.append(f"Set: {_yaml(advised)}")
    return Report(
        title=f"How attention reads memories, by {count} of the bank's own statements",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=dict(results.fingerprints),
        summary=tuple(lines),
        tables=(
            Table(
                "Chosen values", ("", "by the first half", "by the second", "by all", "kept", "gained"), tuple(walked)
            ),
            Table("Values that were tried", (*AXES, "log-likelihood", "more than before"), tuple(rows)),
        ),
        plots=(),
        results={
            "former": asdict(former),
            "advised": asdict(advised),
            "gained": {one.axis: asdict(one.gained) for one in results.steps},
        },
    )


def _cells(reading: Reading) -> tuple[object, ...]:
    return tuple(f"{getattr(reading, name):g}" for name in AXES)


def _yaml(reading: Reading) -> str:
    return ", ".join(f"memory.{name}: {getattr(reading, name):g}" for name in AXES)
