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
    former, best, seed = results.former, results.best, settings.seed
    gained = difference(results.judged[former], results.judged[best], seed)
    rows = [
        (*_cells(reading), mean(values, seed), difference(values, results.tried[best], seed))
        for reading, values in results.tried.items()
    ]
    judged = [
        (name, *_cells(reading), mean(results.judged[reading], seed))
        for name, reading in (("before", former), ("best of the first half", best))
    ]
    advised = best if gained.low > 0 else former
    lines = [f"Divergence of answers from memory from answers from text: {mean(results.judged[former], seed)} nats a "
             f"token before, {mean(results.judged[best], seed)} with the values that were best on other statements: "
             f"{gained} less."]  # fmt: skip
    if advised == former:
        lines.append("Statements that the values were not chosen on cannot tell them from those before, which stay.")
    lines.append(f"Set: {_yaml(advised)}")
    return Report(
        title=f"How attention reads memories, by {len(results.judged[best])} of the bank's own statements",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=dict(results.fingerprints),
        summary=tuple(lines),
        tables=(
            Table("The other half of the statements", ("", *AXES, "divergence"), tuple(judged)),
            Table("Values that were tried", (*AXES, "divergence", "more than the best"), tuple(rows)),
        ),
        plots=(),
        results={"former": asdict(former), "best": asdict(best), "advised": asdict(advised), "gained": asdict(gained)},
    )


def _cells(reading: Reading) -> tuple[object, ...]:
    return tuple("null" if (value := getattr(reading, name)) is None else f"{value:g}" for name in AXES)


def _yaml(reading: Reading) -> str:
    score = "null" if reading.score_temperature is None else f"{reading.score_temperature:g}"
    return (
        f"memory.attention_temperature: {reading.attention_temperature:g}, "
        f"memory.attention_weight: {reading.attention_weight:g}, recall.score_temperature: {score}"
    )
