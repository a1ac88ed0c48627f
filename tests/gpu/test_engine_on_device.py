"""The engine's laws on a GPU, where steps are captured, launched ahead and fed by recalls on streams of their own."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from m3model.engine.engine import MemoryEngine
from m3model.engine.graph import GraphedStep
from m3runtime.adapters.engine import answers
from m3runtime.device.resolve import resolve
from tests.model.banks import make_runtime
from tests.model.families import make_adapter, make_model, random_text
from tests.model.test_engine import Engines

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact() -> Any:
    """Matrix products in float32, and not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


class TestOnDevice(Engines):
    examples = 6

    @pytest.fixture(autouse=True)
    def open(self, tmp_path: Path) -> Iterator[None]:
        model = copy.deepcopy(make_model(self.family)).to(resolve("cuda"))
        self.adapter = make_adapter(model=model)
        texts = [random_text(self.adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
        with ExitStack() as closing:
            config = {"path": "given", "device": "cuda"}
            self.runtime = closing.enter_context(make_runtime(self.adapter, tmp_path / "bank", texts, model=config))
            self.streams = closing
            yield

    def test_steps_are_captured_and_give_what_the_cpu_gives(self) -> None:
        engine = self.make_engine()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [answers(engine, [request])[0] for _ in range(2) for request in self.make_requests()]
        step = engine._runner._run
        assert isinstance(step, GraphedStep)
        assert step._captured
        cpu = make_adapter(self.family)
        assert isinstance(cpu.engine, MemoryEngine)
        for request, answer in zip(self.make_requests(), found, strict=False):
            if request.stream is None:
                assert answers(cpu.engine, [request])[0].tokens == answer.tokens
