"""``m3 eval budgets``."""

from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli.evaluating import Out, finish, require_libraries
from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars


def budgets(
    corpus: Annotated[list[Path], typer.Option("--corpus", help="Text of the bank's kind; may be repeated.")],
    config: ConfigFile = None,
    out: Out = Path("eval-budgets"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that a head keeps on average.")] = 32,
    references: Annotated[int, typer.Option(min=4, help="Number of references to look at.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of their choice.")] = 0,
    set: Set = None,
    json: Json = False,
) -> None:
    """Choose memory.tokens_per_head for each KV head: a few heads need all tokens, and most need hardly any.

    Tokens are scored by the attention of a model that repeats the text, whatever memory.select_by is for the bank. It
    says what to set for a new bank, and changes nothing.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.budgets import BudgetSettings
    from m3runtime.lab.evaluation.budgets_report import evaluate_budgets

    asked = BudgetSettings(tuple(map(str, corpus)), tokens, references, seed)
    with progress_bars(shown=not json) as progress:
        report = evaluate_budgets(settings, asked, progress)
    finish(report, out, json=json)
