"""Does a model answer better if its memories begin with the headings of their texts?

``make quality NAME=headings`` runs it on SmolLM2-135M and writes docs/quality/headings. Headings are embedded with
their texts either way, so the same memories are recalled: only what the model has read differs.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.cli.progress import progress_bars
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.documents.reference import Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statements import Statement, make_statement
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.lab.evaluation.trials import Trial, Trials, changed
from m3runtime.lab.evaluation.world import Question, World, make_world

SEED = 2
"""No setting was chosen on its questions."""
REFERENCES, QUESTIONS = 80, 100
PASSAGES, STATEMENTS = 96, 80
HEADING_TOKENS = 32
"""The room for a heading in the 128 tokens of a reference of a real document."""


@dataclass(frozen=True)
class Set:
    """References with a heading each, and questions or statements to complete about them."""

    name: str
    references: tuple[Reference, ...]
    questions: tuple[Question, ...]
    form: str
    """The value of ``generate.prompt``."""


@dataclass(frozen=True)
class Result:
    """The answers to the questions of a set."""

    set: Set
    text: Trial
    """The model has read texts alone."""
    headed: Trial
    """The model has read headings before their texts."""


def facts(form: str) -> Iterator[Set]:
    """Invented facts whose references need their heading, have no need of it, and have one that tells nothing."""
    sizes = {"references": REFERENCES, "questions": QUESTIONS, "unanswerable": 0}
    for name, named, told in (
        ("the text says *it* of what the heading names", False, True),
        ("the text names it as well", True, True),
        ("the text names it, and the heading tells nothing", True, False),
    ):
        world = make_world(SEED, named=named, **sizes)
        titles = [title[0].upper() + title[1:] for title in world.names]
        headings = titles if told else [f"Records > Sheet {number}" for number in range(1, len(titles) + 1)]
        pairs = zip(world.references, headings, strict=True)
        references = tuple(Reference(text, 0, heading) for text, heading in pairs)
        yield Set(name, references, world.questions, form)


def manual(adapter: Adapter, corpus: Path) -> Set:
    """Passages of real documents; statements out of them are completed."""
    rng = random.Random(SEED)
    documents = sorted(read_documents([corpus]), key=lambda document: document.name)
    rng.shuffle(documents)
    splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens - HEADING_TOKENS)
    found = (short(one, adapter) for document in documents for one in splitter.split(document.text, document.source))
    references = list(islice((one for one in found if one.heading), PASSAGES))
    made = [make_statement(number, one.text, SEED) for number, one in enumerate(references)]
    statements = [one for one in made if one is not None and one.answer.startswith(" ")]
    chosen = rng.sample(statements, min(STATEMENTS, len(statements)))
    return Set("the Python language reference", tuple(references), tuple(map(question, chosen)), "plain")


def short(reference: Reference, adapter: Adapter) -> Reference:
    """The reference without the first titles of its heading, as far as there is no room for them."""
    titles = reference.heading.split(" > ") if reference.heading else []
    while titles and adapter.count_tokens(" > ".join(titles) + "\n") > HEADING_TOKENS:
        titles.pop(0)
    return Reference(reference.text, reference.tokens, " > ".join(titles), reference.places)


def question(statement: Statement) -> Question:
    """A statement as a question, which is asked for by completion."""
    answer = statement.answer.strip()
    return Question(statement.prompt, statement.prompt, (answer,), statement.reference, (), "statement")


def study(config: Config, adapter: Adapter, some: Set, progress: Any) -> Result:
    """Ask all questions of a set twice."""
    headed = tuple(reference.headed for reference in some.references)
    world = World(SEED, headed, some.questions, ())
    config = changed(config, {"generate.prompt": some.form, "generate.max_new_tokens": 16})

    def run(title: str, reads: Sequence[str]) -> Trial:
        trials = Trials(config, adapter, world, reads=reads)
        trials.progress = lambda what, done, of: progress(f"{some.name}, {title}: {what}", done, of)
        return trials.run("memory", {"codec": {"kind": "raw"}})

    return Result(some, run("text", [one.text for one in some.references]), run("headed", headed))


def main(config: Config, corpus: Path, out: Path, command: str) -> None:
    """Measure, and write the report into ``out``."""
    config = changed(config, {"model.dtype": "bfloat16"})  # half the time
    adapter = assembly.open_adapter(config)
    with progress_bars(shown=sys.stderr.isatty()) as progress:
        sets = [*facts(config.generate.prompt), manual(adapter, corpus)]
        results = [study(config, adapter, some, progress) for some in sets]
    report(results, config, adapter, command).save(out)


def report(results: Sequence[Result], config: Config, adapter: Adapter, command: str) -> Report:
    """The tables of exact answers and likelihoods."""
    tables = []
    for title, values in (
        ("Exact answers", lambda trial: trial.right),
        ("Log-likelihood of the right answer", lambda trial: trial.log_probs),
    ):
        rows = [
            (one.set.name, len(one.set.questions), *(mean(values(each), SEED) for each in (one.text, one.headed)),
             difference(values(one.headed), values(one.text), SEED))
            for one in results
        ]  # fmt: skip
        columns = ("references", "questions", "the text is read", "heading and text are read", "difference")
        tables.append(Table(title, columns, tuple(rows), "In brackets, 95 % of bootstrap resamples of the questions."))
    return Report(
        title="Headings that the model reads",
        command=command,
        settings={"seed": SEED, "references": REFERENCES, "passages": PASSAGES, "heading_tokens": HEADING_TOKENS},
        config=config.model_dump(mode="json"),
        fingerprints={"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint},
        summary=(
            "Memories are not quantised. The same memories are recalled for both columns, found by heading and text.",
        ),
        tables=tuple(tables),
        plots=(),
        results={one.set.name: {"text": asdict(one.text), "headed": asdict(one.headed)} for one in results},
    )
