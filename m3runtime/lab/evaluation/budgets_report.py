"""`budgets_report`: the results of ``m3 eval budgets``, and what they say to set."""

from dataclasses import asdict

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.budgets import BudgetResults, BudgetSettings, fit_budgets
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.writing.writer import OnProgress


def evaluate_budgets(config: Config, settings: BudgetSettings, progress: OnProgress = silent) -> Report:
    """Fit, see `fit_budgets`, and report."""
    return budgets_report(fit_budgets(config, settings, assembly.open_adapter, progress), settings, config)


def budgets_report(results: BudgetResults, settings: BudgetSettings, config: Config) -> Report:
    """The report, whose last line of the summary is to be written into the configuration."""
    every = [budget for layer in results.budgets for budget in layer]
    with_budgets, without = results.held
    written = str([list(layer) for layer in results.budgets])
    return Report(
        title=f"Tokens that heads should keep, by {results.references} references of {', '.join(settings.corpus)}",
        command=settings.command,
        settings={**asdict(settings), "corpus": " ".join(settings.corpus)},
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=(
            f"Heads keep {results.mean:.1f} tokens of these references on average: {min(every)} to {max(every)}.",
            f"{with_budgets:.1%} of the attention to memories falls on kept tokens; it would be {without:.1%} if each "
            f"head kept {settings.tokens}.",
            "Attention reads as many columns as the largest budget. A bank is written with budgets, or anew.",
            f"Set: memory.tokens_per_head: {written}",
        ),
        tables=(
            Table(
                "Budgets",
                ("layer", "tokens of each KV head"),
                tuple(
                    (layer, ", ".join(map(str, budgets)))
                    for layer, budgets in zip(results.layers, results.budgets, strict=True)
                ),
            ),
        ),
        plots=(),
        results=asdict(results),
    )
