"""``m3 eval``: the effect of memories on answers."""

from pathlib import Path
from typing import Annotated

import typer

from m3runtime.cli import eval_budgets, eval_search
from m3runtime.cli.evaluating import Out, References, Seed, finish, require_libraries
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, load, overrides
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say

app = typer.Typer(
    name="eval",
    help="Compare, on your own model, answers from memories with answers from text in the prompt.",
    no_args_is_help=True,
)

Questions = Annotated[int, typer.Option("--questions", min=1, help="Number of questions that the references answer.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Questions in one batch.")]
Statements = Annotated[bool, typer.Option("--statements", help="Ask for the end of statements instead of questions.")]


@app.command()
def facts(
    config: ConfigFile = None,
    out: Out = Path("eval-facts"),
    seed: Seed = 0,
    references: References = 320,
    questions: Questions = 200,
    unanswerable: Annotated[int, typer.Option(min=0, help="Number of questions that no reference answers.")] = 50,
    statements: Statements = False,
    batch: Batch = 16,
    set: Set = None,
    json: Json = False,
) -> None:
    """Ask questions about invented facts: without references, with them as text, and with memories.

    It can be stopped at any moment and run again with the same --out: it resumes. The configured bank is not changed.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.facts import FactsSettings
    from m3runtime.lab.evaluation.facts_report import evaluate_facts

    asked = FactsSettings(
        seed=seed,
        references=references,
        questions=questions,
        unanswerable=unanswerable,
        ask="statements" if statements else "questions",
        batch=batch,
    )
    with progress_bars(shown=not json) as progress:
        report = evaluate_facts(settings, asked, out, progress)
    finish(report, out, json=json)


@app.command()
def qa(
    questions: Annotated[Path, typer.Option("--questions", help="File of questions: see above.")],
    config: ConfigFile = None,
    out: Out = Path("eval-qa"),
    seed: Seed = 0,
    most: Annotated[int, typer.Option("--most", min=1, help="Most questions, drawn by the seed.")] = 200,
    texts: Annotated[
        int | None,
        typer.Option(
            "--texts",
            min=0,
            help="Ask a bank of the file's own texts: those with answers, and others up to so many in all.",
        ),
    ] = None,
    batch: Batch = 16,
    set: Set = None,
    json: Json = False,
) -> None:
    """Ask your own questions: without references, with them as text, and with memories.

    A line of the file is JSON with question and answers: a text, a list of texts, or none where nothing answers it.
    With source, a source in the bank, the right memory is known. Files of SQuAD, NQ-open, HotpotQA and MS MARCO are
    read as they are. The configured bank is asked and not changed; with --texts, a new bank in --out has texts that
    come with the questions. It can be stopped at any moment and run again with the same --out: it resumes.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.qa import QaSettings
    from m3runtime.lab.evaluation.qa_report import evaluate_qa

    asked = QaSettings(str(questions), seed, most, texts, batch)
    with progress_bars(shown=not json) as progress:
        report = evaluate_qa(settings, asked, out, progress)
    finish(report, out, json=json)


@app.command()
def sweep(
    config: ConfigFile = None,
    out: Out = Path("eval-sweep"),
    seed: Seed = 1,
    references: References = 160,
    questions: Questions = 100,
    corpus: Annotated[
        list[Path] | None, typer.Option("--corpus", help="Real text to try chunk lengths on; may be repeated.")
    ] = None,
    axis: Annotated[list[str] | None, typer.Option(help="Try only this setting; may be repeated.")] = None,
    batch: Batch = 16,
    set: Set = None,
    json: Json = False,
) -> None:
    """Try one setting after the other, and recommend a value for each.

    This takes long. It can be stopped at any moment and run again with the same --out. Measure the recommended settings
    with `m3 eval facts` and another seed: on the questions that they were chosen by, they look better than they are.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.sweep import SweepSettings
    from m3runtime.lab.evaluation.sweep_report import evaluate_sweep

    tried = SweepSettings(
        seed=seed,
        references=references,
        questions=questions,
        batch=batch,
        axes=tuple(axis or ()),
        corpus=tuple(map(str, corpus or ())),
    )
    with progress_bars(shown=not json) as progress:
        report = evaluate_sweep(settings, tried, out, progress)
    finish(report, out, json=json)


@app.command()
def text(
    corpus: Annotated[list[Path], typer.Option("--corpus", help="Files or folders of real text; may be repeated.")],
    config: ConfigFile = None,
    out: Out = Path("eval-text"),
    seed: Seed = 0,
    passages: Annotated[int, typer.Option(min=2, help="Number of held-out passages.")] = 40,
    chunks: Annotated[int, typer.Option(min=1, help="Scored chunks of each passage.")] = 3,
    share: Annotated[float, typer.Option(min=0, max=1, help="Most of a reference that a passage may have.")] = 2 / 3,
    batch: Annotated[int, typer.Option(min=1, help="Passages in one batch.")] = 8,
    set: Set = None,
    json: Json = False,
) -> None:
    """Score held-out passages of real text: alone, with references as text, and with memories.

    References are the other parts of the passages' documents. It can be stopped at any moment and run again with the
    same --out. The configured bank is not changed.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.text_report import TextSettings, evaluate_text

    scored = TextSettings(tuple(map(str, corpus)), seed, passages, chunks, share)
    with progress_bars(shown=not json) as progress:
        report = evaluate_text(settings, scored, out, batch, progress)
    finish(report, out, json=json)


@app.command()
def calibrate(
    config: ConfigFile = None,
    out: Out = Path("eval-calibrate"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the statements.")] = 0,
    statements: Annotated[int, typer.Option("--statements", min=8, help="Number of statements to complete.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Answers in one batch.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changed file, and do not write it.")] = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Choose recall.memories, min_score and margin on statements from your bank, and write them into your file.

    It can be stopped at any moment and run again with the same --out: it resumes. The bank is not changed; in the file,
    only these three values change, each with the evidence as a comment.
    """
    loaded = load(config, set)
    require_libraries()
    from m3runtime.lab.evaluation import yaml_edit
    from m3runtime.lab.evaluation.calibrate import CalibrationSettings
    from m3runtime.lab.evaluation.calibrate_file import CalibratedFile

    file = CalibratedFile(loaded, overrides(set), dry_run=dry_run)
    for key, origin in file.overridden.items():
        say(f"m3: recall.{key} is set by {origin}, which goes before what the file says", err=True)
    asked = CalibrationSettings(seed=seed, statements=statements, batch=batch)
    with progress_bars(shown=not json) as progress:
        report, text = file.calibrated(asked, out, progress)
    report.save(out)
    if not dry_run:
        yaml_edit.replace(file.path, text)
    if json:
        print_json({**report.to_json(), "file": str(file.path), "written": not dry_run, "text": text})
        return
    for line in [*report.summary, str(out / "report.md")]:
        say(line, err=dry_run)  # standard output is then the file alone
    say(text if dry_run else f"written into {file.path}", nl=not dry_run)


@app.command("calibrate-attention")
def calibrate_attention(
    config: ConfigFile = None,
    out: Out = Path("eval-calibrate-attention"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the statements.")] = 0,
    statements: Annotated[int, typer.Option("--statements", min=16, help="Number of statements to continue.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Statements in one batch.")] = 16,
    set: Set = None,
    json: Json = False,
) -> None:
    """Choose how attention reads memories: memory.attention_temperature and attention_weight.

    What your texts say shall be as likely as can be when it is read from memory. It takes statements of your bank and
    no questions; each half judges what the other chooses. It says what to set, and changes nothing.
    """
    settings = configuration(config, set)
    require_libraries()
    from m3runtime.lab.evaluation.attention import AttentionSettings
    from m3runtime.lab.evaluation.attention_report import evaluate_attention

    asked = AttentionSettings(seed, statements, batch)
    with progress_bars(shown=not json) as progress:
        report = evaluate_attention(settings, asked, progress)
    finish(report, out, json=json)


for _command in (eval_budgets.budgets, eval_search.search, eval_search.floor, eval_search.conversations):
    app.command()(_command)
