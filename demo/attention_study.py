"""Do values that were calibrated without questions answer as well as those that were chosen by hand on questions?

``make quality NAME=attention`` runs it on SmolLM2-135M and writes docs/quality/attention. Values are calibrated on the
references of one world, as ``m3 eval calibrate-attention`` does, and tried on the questions of another.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3runtime import assembly
from m3runtime.cli.progress import progress_bars
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.evaluation.attention import AttentionSettings, Reading
from m3runtime.lab.evaluation.attention_report import evaluate_attention
from m3runtime.lab.evaluation.banks import write_bank
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.lab.evaluation.trials import Trial, Trials, changed
from m3runtime.lab.evaluation.world import make_world

SEED = 21
"""The seed of the world whose references values are calibrated on."""
OTHER_SEED = 22
"""The seed of the world whose questions are asked. No value was chosen on either."""
REFERENCES, STATEMENTS = 96, 64
ASKED_REFERENCES, QUESTIONS = 64, 64


def calibrated(config: Config, folder: Path, progress: Any) -> Mapping[str, Any]:
    """The results of the calibration, which is not repeated if its report is in the folder."""
    if not (folder / "report.json").exists():
        world = make_world(SEED, references=REFERENCES, questions=1, unanswerable=0)
        documents = [Document(f"world-{SEED}:{number}", text) for number, text in enumerate(world.references)]
        config = config.model_copy(update={"bank": folder / "bank"})
        embedder = assembly.open_embedder(config)
        write_bank(config, assembly.open_adapter(config), embedder, documents, progress)
        embedder.close()
        evaluate_attention(config, AttentionSettings(statements=STATEMENTS), progress).save(folder)
    found: Mapping[str, Any] = json.loads((folder / "report.json").read_text())["results"]
    return found


def keys(reading: Reading) -> Mapping[str, Any]:
    """The values by key of the configuration."""
    return {f"memory.{name}": value for name, value in asdict(reading).items()}


def main(config: Config, corpus: Path, out: Path, command: str) -> None:  # noqa: ARG001 - as the other studies
    """Calibrate, ask, and write the report into ``out``."""
    config = changed(config, {"model.dtype": "bfloat16", "codec": {"kind": "scalar"}, "generate.max_new_tokens": 12})
    with progress_bars(shown=sys.stderr.isatty()) as progress:
        found = calibrated(config, out / "calibration", progress)
        readings = {"chosen by hand": Reading.of(config), "calibrated": Reading(**found["advised"])}
        world = make_world(OTHER_SEED, references=ASKED_REFERENCES, questions=QUESTIONS, unanswerable=0)
        trials = Trials(config, assembly.open_adapter(config), world)
        trials.progress = progress
        results = {name: trials.run("memory", keys(reading)) for name, reading in readings.items()}
    report(config, found, readings, results, command).save(out)


def report(
    config: Config,
    found: Mapping[str, Any],
    readings: Mapping[str, Reading],
    results: Mapping[str, Trial],
    command: str,
) -> Report:
    """Both settings, and their difference."""
    rows = [
        (name, *asdict(readings[name]).values(),
         mean(one.right, OTHER_SEED), mean(one.log_probs, OTHER_SEED))
        for name, one in results.items()
    ]  # fmt: skip
    hand, ours = results["chosen by hand"], results["calibrated"]
    against = (
        ("exact answers, calibrated less by hand", difference(ours.right, hand.right, OTHER_SEED)),
        ("log-likelihood, calibrated less by hand", difference(ours.log_probs, hand.log_probs, OTHER_SEED)),
    )
    return Report(
        title="Values calibrated without questions",
        command=command,
        settings={"seed": SEED, "other_seed": OTHER_SEED, "references": REFERENCES, "statements": STATEMENTS,
                  "asked_references": ASKED_REFERENCES, "questions": QUESTIONS},
        config=config.model_dump(mode="json"),
        fingerprints={},
        summary=(
            *(
                f"{axis}: the log-likelihood of what the references say is {one['value']:.3f} ({one['low']:.3f} to "
                f"{one['high']:.3f}) higher with what other statements choose."
                for axis, one in found["gained"].items()
            ),
        ),
        tables=(
            Table("Answers from memory", ("", *asdict(readings["calibrated"]), "exact answers",
                                          "log-likelihood of the right answer"), tuple(rows)),
            Table("Difference", ("", ""), against),
        ),
        plots=(),
        results={"calibration": found, "answers": {name: asdict(one) for name, one in results.items()}},
    )  # fmt: skip
