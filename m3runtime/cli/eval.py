"""``m3 eval``: the effect of memories on answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.calibrate import calibrate
from m3runtime.cli.options import ConfigFile, Json, Set, configuration, print_json
from m3runtime.cli.progress import stages

if TYPE_CHECKING:
    from m3runtime.lab.evaluation.report import Report

app = typer.Typer(
    name="eval",
    help="Compare, on your own model, answers from memories with answers from text in the prompt.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the state of a stopped run.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the questions.")]
References = Annotated[int, typer.Option("--references", min=1, help="Number of invented references.")]
Questions = Annotated[int, typer.Option("--questions", min=1, help="Number of questions that the references answer.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Questions in one batch.")]
Statements = Annotated[bool, typer.Option("--statements", help="Ask for the end of statements instead of questions.")]

_STAGES = {"codec": "Training the codec", "memories": "Writing memories", "timing": "Measuring times"}
"""Names of stages for progress bars; the other stages are modes, and the settings of a sweep."""


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
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 eval", "eval")
    from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
    from m3runtime.lab.evaluation.facts_report import facts_report

    asked = FactsSettings(
        seed=seed,
        references=references,
        questions=questions,
        unanswerable=unanswerable,
        ask="statements" if statements else "questions",
        batch=batch,
    )
    run = FactsRun(settings, asked, out)
    with stages(_STAGES, shown=not json) as progress:
        results = run.run(assembly.open_adapter(settings), progress)
    command = f"m3 eval facts --seed {seed} --references {references} --questions {questions} "
    command += f"--unanswerable {unanswerable}{' --statements' if statements else ''}"
    _finish(facts_report(results, asked, run.config, command), out, json=json)


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
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 eval", "eval")
    from m3runtime.documents.reading import read_documents
    from m3runtime.lab.evaluation.chunks import chunk_lengths
    from m3runtime.lab.evaluation.sweep import SweepRun, SweepSettings
    from m3runtime.lab.evaluation.sweep_report import sweep_report
    from m3runtime.lab.evaluation.trials import changed

    tried = SweepSettings(seed=seed, references=references, questions=questions, batch=batch)
    run = SweepRun(settings, tried, out, axis or ())
    documents = list(read_documents(corpus)) if corpus else []
    adapter = assembly.open_adapter(settings)
    with stages(_STAGES, shown=not json) as progress:
        results = run.run(adapter, progress)
        found = changed(settings, results.kept)
        chunks = chunk_lengths(
            found, adapter.with_memory(found.memory), documents, out, passages=20, seed=seed, progress=progress
        ) if documents else ()  # fmt: skip
    command = f"m3 eval sweep --seed {seed} --references {references} --questions {questions}"
    command += "".join(f" --axis '{name}'" for name in axis or ()) + "".join(
        f" --corpus {path}" for path in corpus or ()
    )
    _finish(sweep_report(results, chunks, tried, run.config, command), out, json=json)


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
    from m3runtime import assembly
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 eval", "eval")
    from m3runtime.documents.reading import read_documents
    from m3runtime.lab.evaluation.passages import hold_out
    from m3runtime.lab.evaluation.text_report import TextSettings, text_report
    from m3runtime.lab.evaluation.text_run import run_text

    documents = list(read_documents(corpus))
    scored = TextSettings(tuple(map(str, corpus)), seed, passages, chunks, share)
    adapter = assembly.open_adapter(settings)
    held_out = hold_out(
        documents,
        adapter,
        passages=passages,
        chunk_tokens=settings.recall.chunk_tokens,
        reference_tokens=adapter.spec.reference_tokens,
        continuation=chunks,
        share=share,
        seed=seed,
    )
    with stages(_STAGES, shown=not json) as progress:
        results = run_text(settings, adapter, held_out, out, batch_size=batch, progress=progress)
    command = f"m3 eval text {' '.join(f'--corpus {path}' for path in corpus)} --seed {seed} "
    command += f"--passages {passages} --chunks {chunks} --share {share:g}"
    _finish(text_report(results, scored, held_out, settings, command), out, json=json)


app.command()(calibrate)


def _finish(report: "Report", out: Path, *, json: bool) -> None:
    report.save(out)
    if json:
        print_json(report.to_json())
        return
    for line in report.summary:
        typer.echo(line)
    typer.echo(f"{out / 'report.md'}")
