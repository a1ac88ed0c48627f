"""Training of a model of 135 million parameters to read memories, with random weights and random tokens."""

import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from m3model.memory3 import Memory3Config, Memory3ForCausalLM
from m3model.training.compiling import compile_training
from m3model.training.sequences import Prepared, TokenRows, TrainingSequences
from m3model.training.stage import run_stage
from m3runtime.config.train import StageConfig, TrainConfig
from tests.gpu.models import REAL, TINY, llama
from tests.gpu.report import Figure

BATCH = 4
TARGET = 130_000
"""Tokens per second on an H100; 27,000 were measured at 1f7c192."""


def training(device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """Tokens per second of `m3 train` as it runs there, and what compiling changes."""
    chunk, width, text = (8, 16, 64) if tiny else (64, 128, 2048)
    prepared = _prepared(TINY.vocabulary if tiny else REAL.vocabulary, chunk, width, text)
    data = TrainingSequences(prepared, reading=True, begin=0)
    batch = {name: x.to(device) for name, x in data.collate([data[row] for row in range(BATCH)]).items()}
    model = _model(device, chunk, width, tiny=tiny)
    plain = _gradient(model, batch)
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            _gradient(model, batch)
            torch.cuda.set_sync_debug_mode("default")
        texts = [str(one.message) for one in waits if "synchroniz" in str(one.message)]
        yield Figure("times that a step waits for the device", len(texts), most=0, details="\n".join(texts))
    yield from _speed("without compiling", _model(device, chunk, width, tiny=tiny), data, device, tiny=tiny)
    if tiny:  # a compiler takes longer than all checks; that layers compile is tested elsewhere
        return
    compile_training(model)
    began = time.perf_counter()
    compiled = _gradient(model, batch)
    yield Figure("seconds of compiling", time.perf_counter() - began, "s", most=120)
    yield Figure("compiled: difference of the gradient", _difference(compiled, plain), "of its norm", most=1e-2)
    yield from _speed("compiled", model, data, device, tiny=tiny, least=TARGET)
    if device.type == "cuda":
        yield Figure("device memory at most", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def _speed(
    title: str,
    model: Memory3ForCausalLM,
    data: TrainingSequences,
    device: torch.device,
    *,
    tiny: bool,
    least: float | None = None,
) -> Iterator[Figure]:
    """A stage of `m3 train`, from its third step on or, as long as shapes may be compiled anew, its tenth."""
    steps, first = (4, 2) if tiny else (40, 10)
    at: dict[int, float] = {}

    def progress(step: int, _: int) -> None:
        if step in (first, steps):
            if device.type == "cuda":
                torch.cuda.synchronize()
            at[step] = time.perf_counter()

    with tempfile.TemporaryDirectory(prefix="m3-train-") as folder:
        settings = TrainConfig.model_validate(
            {
                "data": [folder],
                "out": folder,
                "batch_size": BATCH,
                "precision": "float32" if tiny else "bfloat16",
                "compile": False,  # or it is compiled already
                "log_every": steps,
            }
        )
        losses = run_stage("memory", model, data, settings, StageConfig(steps=steps), progress)
    speed = (steps - first) * BATCH * len(data[0]["ids"]) / (at[steps] - at[first])
    yield Figure(f"{title}: tokens/s", speed, least=least)
    yield Figure(f"{title}: losses that are no number", sum(not math.isfinite(one.loss) for one in losses), most=0)


def _prepared(vocabulary: int, chunk: int, width: int, text: int) -> Prepared:
    """Sequences, and a reference of its own for each of their chunks."""
    random = np.random.default_rng(0)
    sequences, chunks = 2 * BATCH, text // chunk
    counts = {"sequences": [text] * sequences, "references": random.integers(width // 2, width, sequences * chunks)}
    rows = {
        name: TokenRows(random.integers(4, vocabulary, int(np.sum(of))).astype(np.int32), np.cumsum(of))
        for name, of in counts.items()
    }
    retrieved = np.arange(sequences * chunks, dtype=np.int32).reshape(sequences, chunks)
    return Prepared(rows["sequences"], rows["references"], retrieved)


def _model(device: torch.device, chunk: int, width: int, *, tiny: bool) -> Memory3ForCausalLM:
    shape = TINY if tiny else REAL
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(llama(shape, shape.vocabulary)).train()
    config = Memory3Config(
        text_config=model.config, tokens_per_head=8, reference_tokens=width, sink_ids=[0, 5, 6], chunk_tokens=chunk
    )
    return Memory3ForCausalLM.holding(model, config)


def _gradient(model: Memory3ForCausalLM, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The gradient of one batch, in the precision that it is trained in."""
    model.zero_grad()
    kind = batch["input_ids"].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


def _difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(some, others, strict=True))
    return math.sqrt(apart / sum(float(one.double().square().sum()) for one in others))
