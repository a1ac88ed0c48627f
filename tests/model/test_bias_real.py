"""Bias directions of a real model, over near and far positions."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import MemoryConfig, ModelConfig

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.mark.parametrize("length", [200, 2048, 8061])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_has_directions(smollm2_path: Path, length: int, dtype: str) -> None:
    if dtype == "bfloat16" and length > 2048:
        pytest.skip("takes an hour on a CPU without instructions for bfloat16")
    model = ModelConfig(path=str(smollm2_path), dtype=dtype)
    adapter = TransformersAdapter.open(model, MemoryConfig(), torch.device("cpu"))
    references = [piece for topic in sorted(topics) for piece in adapter.cut(topics[topic], 120) if piece.strip()]
    found = adapter.calibrate_bias(references[:400], length, lambda *_: None)
    assert found.facts.weights
    assert found.facts.null_level <= 80
    for stretch in found.facts.stretches:
        assert stretch.error < 0.15
    assert found.std.median() < 0.12
    assert found.std.max() < 0.4
