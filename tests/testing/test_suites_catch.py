"""The suites fail for what is broken, and pass for what it is made of.

Each file of ``broken`` holds implementations with one mistake each, and holds each against the law that catches it, or
against its whole suite; here that is done by a pytest of its own, whose report is read. It is the one place where tests
look at a clock.
"""

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.testing.broken.laws import CAUGHT_BY

ROOT = Path(__file__).parents[2]
FILES = ["slabs", "folders", "homes", "codecs", "indexes", "policies", "embedders", "hierarchies", "rerankers", "pools"]
LEAST = 95
"""Fewest implementations that are broken."""
SECONDS = 60


@dataclass
class Verdict:
    """What a suite said about one implementation."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """The laws that it broke."""
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_suites(files: list[str], report: Path) -> dict[str, Verdict]:
    """Run files of ``broken``. Returns the verdicts by file and test class."""
    paths = [f"tests/testing/broken/{name}.py" for name in files]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(report.with_name("tests"))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *paths],
        cwd=ROOT,
        env={**environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout[-5000:] + ended.stderr[-5000:]
    verdicts = defaultdict[str, Verdict](Verdict)
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, name = case.attrib["classname"].rpartition(".")
        verdict = verdicts[f"{module.rpartition('.')[2]}.{name}"]
        verdict.seconds += float(case.attrib["time"])
        if case.find("failure") is not None:
            verdict.failed.append(case.attrib["name"])
        elif case.find("error") is not None:
            verdict.errors.append(case.attrib["name"])
        elif case.find("skipped") is None:
            verdict.passed += 1
    return dict(verdicts)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_mistake_is_caught_and_nothing_else(tmp_path: Path) -> None:
    verdicts = run_suites(FILES, tmp_path / "report.xml")
    intact = {name: verdicts.pop(name) for name in [f"{file}.TestIntact" for file in FILES]}
    for name, verdict in verdicts.items():
        sys.stdout.write(f"{name}: {', '.join(verdict.failed) or 'NOT CAUGHT'} ({verdict.seconds:.1f} s)\n")
    assert {name: verdict.failed + verdict.errors for name, verdict in intact.items()} == {name: [] for name in intact}
    assert all(verdict.passed for verdict in intact.values())
    named = {f"{file}.Test{name}" for file, laws in CAUGHT_BY.items() for name in laws}
    assert named - verdicts.keys() == set(), "no law of this name"
    assert len(verdicts) >= LEAST
    assert [name for name, verdict in verdicts.items() if not verdict.failed] == []
    assert [name for name, verdict in verdicts.items() if verdict.seconds > SECONDS] == []
