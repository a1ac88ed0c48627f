"""Importing the package and asking for help are light, and the public names are pinned."""

import json
import subprocess
import sys
from pathlib import Path

import m3runtime
from tests.end_to_end.commands import M3, Place, environment

HEAVY = ("torch", "transformers", "faiss", "lmdb", "usearch", "numpy", "pydantic", "m3backends", "m3model")

NOT_TO_ASK = (
    "faiss",
    "sentence_transformers",
    "FlagEmbedding",
    "sklearn",
    "pandas",
    "matplotlib",
    "bs4",
    "lxml",
    "gguf",
)
"""Modules of writing, of embedders and of experiments. Each would take a part of a second."""


def modules_after(code: str) -> set[str]:
    """The top-level modules in `sys.modules` of a new process after it ran this code."""
    script = f"import sys, json\n{code}\nsys.stderr.write(chr(10) + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def test_importing_the_package_is_light() -> None:
    loaded = modules_after("import m3runtime; m3runtime.__version__; dir(m3runtime)")
    assert not loaded.intersection(HEAVY)


def modules_of(*arguments: str, folder: Path | None = None) -> set[str]:
    """The top-level modules that a new process has after a command."""
    begin = f"import os, runpy\nos.chdir({str(folder or Path.cwd())!r})\nsys.argv = {['m3', *arguments]!r}\n"
    return modules_after(
        f"{begin}try: runpy.run_path({str(M3)!r}, run_name='__main__')\nexcept SystemExit as end: assert not end.code"
    )


def test_help_is_light() -> None:
    loaded = modules_of("--help")
    assert "typer" in loaded
    assert not loaded.intersection(HEAVY)


def test_commands_load_what_they_need_alone(written_once: Place) -> None:
    searching = modules_of("search", "lamp", folder=written_once.folder)
    assert {"torch", "lmdb", "usearch"} <= searching
    assert not searching.intersection({*NOT_TO_ASK, "transformers", "m3model"})
    asking = modules_of("ask", "Who lit the lamp?", folder=written_once.folder)
    assert {"torch", "transformers", "m3model"} <= asking
    assert not asking.intersection(NOT_TO_ASK)


def test_the_public_names() -> None:
    assert sorted(m3runtime.__all__) == [
        "Config",
        "M3Error",
        "MemorySpec",
        "MemoryTensors",
        "Recalled",
        "Runtime",
        "Stream",
        "__version__",
    ]
    assert dir(m3runtime) == sorted(m3runtime.__all__)
    for name in m3runtime.__all__:
        assert getattr(m3runtime, name) is not None
    for name in ("Bank", "torch"):
        assert not hasattr(m3runtime, name)
