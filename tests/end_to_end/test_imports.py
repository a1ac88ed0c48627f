"""Importing the package and asking for help are light, and the public names are pinned."""

import json
import subprocess
import sys

import m3runtime
from tests.end_to_end.commands import M3, environment

HEAVY = ("torch", "transformers", "faiss", "lmdb", "usearch", "numpy", "pydantic", "m3backends", "m3model")


def modules_after(code: str) -> set[str]:
    """The top-level modules in `sys.modules` of a new process after it ran this code."""
    script = f"import sys, json\n{code}\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stderr)}


def test_importing_the_package_is_light() -> None:
    loaded = modules_after("import m3runtime; m3runtime.__version__; dir(m3runtime)")
    assert not loaded.intersection(HEAVY)


def test_help_is_light() -> None:
    code = f"import runpy\nsys.argv = ['m3', '--help']\ntry: runpy.run_path({str(M3)!r}, run_name='__main__')\n"
    loaded = modules_after(code + "except SystemExit: pass")
    assert "typer" in loaded
    assert not loaded.intersection(HEAVY)


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
