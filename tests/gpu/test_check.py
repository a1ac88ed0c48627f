"""The program for GPU machines, with tiny shapes on a CPU: all its mistakes but those of the device show here."""

import json
import os
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from tests.gpu import install, report
from tests.gpu.report import Check, Figure

ROOT = Path(__file__).parents[2]
CHECKS = ("suite", "write", "decode", "codec", "train", "tiers", "recall", "sharing", "preset")


@pytest.mark.long
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "tests/gpu/check.py", "--tiny", "--device", "cpu", "--out", tmp_path, "--only", *CHECKS],
        cwd=ROOT,
        env={**environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["short"] == []
    assert list(found["checks"]) == ["machine", *CHECKS]
    assert (tmp_path / "check.txt").read_text().strip() in ended.stdout


def test_no_check_stops_another(tmp_path: Path) -> None:
    def fails(given: int) -> "report.Iterator[Figure]":
        yield Figure("before", given, most=3)
        raise ValueError("some reason\nand more")

    def dies(given: int) -> "report.Iterator[Figure]":
        yield Figure("before", given, least=3)
        os._exit(9)

    def hangs(given: int) -> "report.Iterator[Figure]":
        yield Figure("before", given)
        while True:
            pass

    checks = [Check(work.__name__, work, seconds) for work, seconds in ((fails, 60), (dies, 60), (hangs, 0.5))]
    found = report.run(checks, 2, ends=report.time.monotonic() + 300)
    assert [[(one.verdict, one.error) for one in figures[:-1]] for figures in found.values()] == [
        [("ok", None), ("FAILED", "ValueError: some reason")],
        [("SHORT", None), ("FAILED", "its process ended with 9")],
        [("", None), ("FAILED", "not done in 0 s")],
    ]
    assert report.short(found) == ["fails: fails", "dies: before", "dies: dies", "hangs: hangs"]
    assert len(report.table(found).splitlines()) == 1 + 3 * 3
    late = report.run(checks, 2, ends=report.time.monotonic())
    assert [[one.verdict for one in figures] for figures in late.values()] == [["skipped"]] * 3


@pytest.mark.parametrize("name", ["gpu", "pinned", "lmdb"])
def test_plug_ins_are_found_in_a_tree_that_is_not_installed(tmp_path: Path, name: str) -> None:
    install.main(tmp_path / "site", tmp_path)
    entries = PathDistribution(tmp_path / "site" / "m3runtime-0.0.0.dist-info").entry_points
    assert name in entries.select(group="m3runtime.tiers").names
