"""Make the figures of docs/quality.md: ``python demo/quality.py NAME``, or ``make quality`` for all of them.

Each is one ``m3 eval`` command on the demo's models, which is printed and run. A stopped run resumes.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

import models
from m3runtime import cli
from m3runtime.cli.demo import SETTINGS
from m3runtime.config.schema import Config

ROOT = Path(__file__).parent.parent
WORK = Path(".quality")  # relative, as it stands in the reports
DOCS = Path("docs/quality")
CORPUS = WORK / "python-reference"
SMALL = ("--references", "80", "--questions", "60", "--unanswerable", "0")
# Where the sweep starts from: the demo's settings came from it.
START = ("--set", "memory.attention_temperature=0.85", "--set", "generate.prompt=question")
LONGEST = 25_000
"""Most characters of a topic; the few longer ones would be half of the corpus."""
RUNS: dict[str, tuple[str, ...]] = {
    "facts": ("facts",),
    "statements": ("facts", "--statements", *SMALL),
    "chat": ("facts", *SMALL, "--set", "generate.prompt=chat", "--set", "memory.place=turn"),
    "chat-start": ("facts", *SMALL, "--set", "generate.prompt=chat"),
    "text": ("text", "--corpus", str(CORPUS)),
    "sweep": ("sweep", "--questions", "80", *START),
    "floor": ("floor",),
    "search": ("search", "--questions", "150", "--texts", "400", "--copies", "4"),
    "conversations": ("conversations",),
    "codec": (),
    "headings": (),
    "tokens": (),
    "hops": (),
    "attention": (),
    "chunks": ("sweep", "--questions", "20", "--axis", "memories", "--corpus", str(CORPUS)),
}

STUDIES = {
    "codec": "codec_study",  # what goes on inside attention, no command of ours sees
    "headings": "headings_study",
    "tokens": "tokens_study",
    "hops": "hops_study",
    "attention": "attention_study",
}
"""Programs of their own, by name."""


def main(names: Sequence[str]) -> None:
    """Run the named evaluations, and copy their reports into the documentation."""
    unknown = sorted(set(names) - set(RUNS))
    if unknown:
        sys.exit(f"quality.py: no evaluation is called {unknown[0]}; there are {', '.join(RUNS)}")
    os.chdir(ROOT)
    write_corpus()
    for name in names or RUNS:
        if name in STUDIES:
            study = import_module(STUDIES[name])
            study.main(configuration(), CORPUS, WORK / name, f"make quality NAME={name}")
            keep(name)
            continue
        command, *rest = RUNS[name]
        arguments = ["eval", command, "--config", str(SETTINGS), "--out", str(WORK / name), *rest]
        print(f"m3 {' '.join(arguments)} --set model.path=... --set embedder.path=...", flush=True)
        sys.argv = ["m3", *arguments, *(f"--set={key}={value}" for key, value in paths().items())]
        run()
        keep(name)


def configuration() -> Config:
    """The demo's configuration."""
    return Config.load(SETTINGS, environ={}, overrides=paths())


def paths() -> dict[str, str]:
    """Where the demo's models are."""
    return {"model.path": str(models.smollm2(Path(".cache/models"))), "embedder.path": str(models.minilm())}


def run() -> None:
    """Run ``m3`` with ``sys.argv``; exit if it fails."""
    try:
        cli.main()
    except SystemExit as exit:
        if exit.code:
            raise


def keep(name: str) -> None:
    """Copy a report and its pictures to the documentation."""
    (DOCS / name).mkdir(parents=True, exist_ok=True)
    for file in (WORK / name).iterdir():
        if file.name == "report.md" or file.suffix in (".png", ".svg"):
            shutil.copyfile(file, DOCS / name / file.name)


def write_corpus() -> None:
    """Write the Python language reference from the standard library, one file for each topic but the longest."""
    shutil.rmtree(CORPUS, ignore_errors=True)
    CORPUS.mkdir(parents=True)
    for topic, text in topics.items():
        if len(text) <= LONGEST:
            (CORPUS / f"{topic}.txt").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
