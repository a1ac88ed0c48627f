"""Every family that vLLM may serve gives our adapter's answers; others are refused by name. See `tests.vllm.family`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m3model.vllm import compat
from tests.vllm import family as tiny

pytestmark = pytest.mark.vllm

FAMILIES = sorted(compat._FAMILIES)


def run(*arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_our_adapter(family: str, tmp_path: Path) -> None:
    """One memory, three, none, and others after each chunk, in float32."""
    result = run("-m", "tests.vllm.family", family, str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert all(found["equal"])
    assert found["difference"] < 1e-4
    assert found["apart"] > 1e-2  # by other memories


def test_a_family_that_was_not_tried_is_refused_by_name(tmp_path: Path) -> None:
    result = run("-m", "tests.vllm.family", "phi3", str(tmp_path))
    assert result.returncode != 0
    assert "models of type phi3 are not tried with vLLM" in result.stderr


def test_a_bank_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    """Of the same shape, so that only its weights tell."""
    tiny.save("qwen3", tmp_path / "model")
    tiny.save("qwen3", tmp_path / "other", seed=2)
    config = tiny.written(tmp_path)
    model = config.model.model_copy(update={"path": str(tmp_path / "other")})
    file = tmp_path / "m3.yaml"
    file.write_text(json.dumps(config.model_copy(update={"model": model}).model_dump(mode="json")))
    options = ["--engine-set", "max_model_len=384", "--engine-set", "block_size=32"]
    main = "from m3runtime.cli import main; main()"
    result = run("-c", main, "serve", "--config", str(file), "--engine", "vllm", *options, "--port", "0")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    [said] = [line for line in result.stderr.splitlines() if "written by another model" in line]
    assert str(tmp_path / "bank") in said
