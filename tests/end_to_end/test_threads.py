"""The threads of a command wait without spinning, unless the user wants that."""

import subprocess
import sys

import pytest

from tests.end_to_end.commands import M3, Place, environment

REPORTS = sys.platform == "linux"
"""GNU's OpenMP, which torch has on Linux, reports its settings when it is loaded."""


@pytest.mark.skipif(not REPORTS, reason="another OpenMP")
@pytest.mark.parametrize(("wish", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_passively_unless_told_otherwise(place: Place, wish: dict[str, str], policy: str) -> None:
    variables = {name: value for name, value in environment().items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [M3, "config"],  # which loads torch
        cwd=place.folder,
        env={**variables, **wish, "OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
