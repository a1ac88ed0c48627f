"""What cannot be served with memories is refused by name when the server starts, in one line."""

import json
from pathlib import Path

import pytest

from m3runtime.config.schema import Config
from tests.vllm import family as tiny

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save("qwen3", folder / "model")
    return tiny.written(folder)


def refused(config: Config, file: Path, *options: str) -> str:
    """The lines of a start that fails as it should."""
    file.write_text(json.dumps(config.model_dump(mode="json")))
    given = [each for one in ("max_model_len=384", "block_size=32", *options) for each in ("--engine-set", one)]
    main = "from m3runtime.cli import main; main()"
    result = tiny.run("-c", main, "serve", "--config", str(file), "--engine", "vllm", *given, "--port", "0")
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_bank_of_another_model(written: Config, tmp_path: Path) -> None:
    """Of the same shape, so that only its weights tell."""
    tiny.save("qwen3", tmp_path / "other", seed=2)
    model = written.model.model_copy(update={"path": str(tmp_path / "other")})
    said = refused(written.model_copy(update={"model": model}), tmp_path / "m3.yaml")
    [line] = [line for line in said.splitlines() if "written by another model" in line]
    assert str(written.bank) in line


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ('speculative_config={"method": "ngram", "num_speculative_tokens": 3}', "speculative decoding"),
        ("no_such_option=1", "no_such_option"),
    ],
)
def test_engines_that_read_no_memories(written: Config, tmp_path: Path, option: str, reason: str) -> None:
    assert reason in refused(written, tmp_path / "m3.yaml", option)


def test_a_family_that_was_not_tried(tmp_path: Path) -> None:
    result = tiny.run("-m", "tests.vllm.family", "phi3", str(tmp_path))
    assert result.returncode != 0
    assert "models of type phi3 are not tried with vLLM" in result.stderr
