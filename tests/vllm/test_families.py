"""Every family that vLLM may serve gives our adapter's answers. See `tests.vllm.family`."""

import json
from pathlib import Path

import pytest

from m3model.vllm import compat
from tests.vllm.family import run

pytestmark = pytest.mark.vllm

FAMILIES = sorted(compat._FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_our_adapter(family: str, tmp_path: Path) -> None:
    """One memory, three, none, and others after each chunk, in float32."""
    result = run("-m", "tests.vllm.family", family, str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert all(found["equal"])
    assert found["difference"] < 1e-4
    assert found["apart"] > 1e-2  # by other memories
