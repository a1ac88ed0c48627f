"""Do memories answer questions that take two references, as well as the same two texts do?

``make quality NAME=hops`` runs it on SmolLM2-135M and writes docs/quality/hops. Both right references are given, so no
search takes part; and the second alone, whose person the question does not name.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.cli.progress import progress_bars
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.lab.evaluation.laboratory import Choice, Laboratory
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean, ratio
from m3runtime.lab.evaluation.trials import changed
from m3runtime.lab.evaluation.world_hops import HopQuestion, HopWorld, make_hops
from m3runtime.recall.lease import Part

SEED = 7
"""No setting was chosen on its questions."""
REFERENCES, QUESTIONS = 192, 24
BATCH = 12
GIVEN = {"both": (0, 1), "the second alone": (1,)}
"""Which of a question's references the model gets."""


@dataclass(frozen=True)
class Result:
    """The answers in one mode, question by question."""

    right: tuple[float, ...]
    log_probs: tuple[float, ...]


def encoded(adapter: Adapter, world: HopWorld) -> dict[int, Part]:
    """The memories of all references that a question takes, not quantised."""
    ids = sorted({id for question in world.questions for id in question.references})
    parts: dict[int, Part] = {}
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        memories = adapter.encode([world.references[id] for id in some])
        for row, (id, count) in enumerate(zip(some, memories.tokens.tolist(), strict=True)):
            parts[id] = memories.keys[row, :, :, :count].clone(), memories.values[row, :, :, :count].clone()
    return parts


def answered(
    config: Config,
    adapter: Adapter,
    world: HopWorld,
    parts: Mapping[int, Part] | None,
    given: Sequence[int],
    progress: Any,
) -> Result:
    """Ask all questions, with references as memories, or without ``parts`` as text."""
    references = {
        id: Reference(text, 0, places=(Place(f"hops:{id}", 0, 0),)) for id, text in enumerate(world.references)
    }
    right, log_probs = [], []
    for start in range(0, len(world.questions), BATCH):
        progress(start, len(world.questions))
        some: Sequence[HopQuestion] = world.questions[start : start + BATCH]
        chosen = [[question.references[place] for place in given] for question in some]
        texts = [None if parts else [world.references[id] for id in ids] for ids in chosen]
        prompts = [
            adapter.render(question.text, config.generate.prompt, read)
            for question, read in zip(some, texts, strict=True)
        ]
        streams = None
        if parts:
            choices = {one.text: [Choice(id, 1.0) for id in ids] for one, ids in zip(some, chosen, strict=True)}
            laboratory = Laboratory(config, adapter.spec, parts, references, choices)
            streams = [laboratory.stream(adapter.dtype) for _ in some]
        wanted = [f" {question.answers[0]}" for question in some]
        for question, (answer, score) in zip(
            some, adapter.examine(prompts, wanted, streams, config.generate), strict=True
        ):
            assert score is not None
            right.append(float(is_right(answer.text, question.answers)))
            log_probs.append(float(np.mean(score.log_probs)))
    return Result(tuple(right), tuple(log_probs))


def main(config: Config, corpus: Path, out: Path, command: str) -> None:  # noqa: ARG001 - as the other studies
    """Measure, and write the report into ``out``."""
    config = changed(config, {"model.dtype": "bfloat16", "generate.max_new_tokens": 12})
    adapter = assembly.open_adapter(config)
    world = make_hops(SEED, references=REFERENCES, questions=QUESTIONS)
    results: dict[tuple[str, str], Result] = {}
    with progress_bars(shown=sys.stderr.isatty()) as progress:
        parts = encoded(adapter, world)
        for given, places in GIVEN.items():
            for way, read in (("memory", parts), ("text", None)):
                title = f"{given}, as {way}"

                def told(done: int, of: int, title: str = title) -> None:
                    progress(title, done, of)

                results[given, way] = answered(config, adapter, world, read, places, told)
    report(results, config, adapter, command).save(out)


def report(results: Mapping[tuple[str, str], Result], config: Config, adapter: Adapter, command: str) -> Report:
    """The table, and memory against text."""
    rows = [(given, way, mean(one.right, SEED), mean(one.log_probs, SEED)) for (given, way), one in results.items()]
    memory, text = results["both", "memory"], results["both", "text"]
    against = (
        ("exact answers, memory against text", ratio(memory.right, text.right, SEED)),
        ("log-likelihood, difference", difference(memory.log_probs, text.log_probs, SEED)),
    )
    columns = ("references given", "as", "exact answers", "log-likelihood of the right answer")
    return Report(
        title="Questions that take two references",
        command=command,
        settings={"seed": SEED, "references": REFERENCES, "questions": QUESTIONS},
        config=config.model_dump(mode="json"),
        fingerprints={"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint},
        summary=("Memories are not quantised, and weigh alike. The second reference is next to the question.",),
        tables=(
            Table("Answers", columns, tuple(rows), "In brackets, 95 % of bootstrap resamples of the questions."),
            Table("Both references, memory against text", ("", ""), against),
        ),
        plots=(),
        results={f"{given}, {way}": asdict(one) for (given, way), one in results.items()},
    )
