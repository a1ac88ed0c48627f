"""Writing takes bounded memory: 1 GB of text against 1 MB, each in a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.end_to_end.commands import environment

BOUND = 200
"""MB by which the peaks may differ."""


def measured(size: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.end_to_end.write_memory", size]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_gigabyte_takes_about_the_memory_of_a_megabyte(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = measured("1MB"), measured("1GB")
    with capsys.disabled():
        sys.stdout.write(f"\n{small}\n{large}\n")
    for name in ("own", "peak"):
        assert large["split"][name] - small["split"][name] <= BOUND
        assert large["written"][name] - small["written"][name] <= BOUND
        assert large[name] - small[name] <= BOUND
