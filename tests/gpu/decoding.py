"""Decoding by the engine on real shapes with random weights: with memories, without, and by the library's own loop."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from m3model.engine.baseline import TransformersBaseline
from m3model.engine.fusing import fuse
from m3model.transformers import TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import Config, GenerateConfig, MemoryConfig
from m3runtime.documents.reference import Reference
from m3runtime.recall.recalled import Recalled
from m3runtime.stream import Stream
from tests.gpu.models import TINY, Shape, llama
from tests.gpu.report import Figure

SHAPES = {
    "2b": Shape(44, 3200, 40, 8, 3200, 49_152, 0, 0, 0),  # of the Memory³ paper
    "8b": Shape(32, 4096, 32, 8, 14_336, 128_256, 0, 0, 0),  # Llama 3
}
_CHUNK = 64
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A batch that decodes with some kind of memories."""

    shape: str
    batch: int
    sparse: bool
    kept: float
    """The least of the tokens/s without memories that it should keep."""
    compiled: float | None = None
    """The least of the library's compiled tokens/s, at batch 1."""


CASES = (
    Case("2b", 1, sparse=True, kept=0.98, compiled=1.0),
    Case("2b", 1, sparse=False, kept=0.95),
    Case("2b", 32, sparse=True, kept=0.98),
    Case("2b", 8, sparse=False, kept=0.9),
    Case("8b", 1, sparse=False, kept=0.97),
)


class RandomMemories:
    """A recaller that gives each stream five memories of random numbers, others at every chunk."""

    def __init__(self, adapter: TransformersAdapter, count: int = 20) -> None:
        recall = {"chunk_tokens": _CHUNK, "lookahead_tokens": 0}
        self.config = Config.model_validate(
            {"bank": "nowhere", "model": {"path": "given"}, "embedder": {"path": "given"}, "recall": recall}
        )
        self.adapter = adapter
        spec = adapter.spec
        shape = (len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim)
        made = {"device": adapter.device, "dtype": adapter.dtype}
        self.parts = [(torch.randn(shape, **made), torch.randn(shape, **made)) for _ in range(count)]
        self.asked = 0

    def recall(self, streams: Sequence[Stream], *_: Any, **__: Any) -> list[Recalled]:
        """Five of them for each stream."""
        found = []
        for _ in streams:
            self.asked += 1
            ids = [(self.asked + place) % len(self.parts) for place in range(5)]
            found.append(
                Recalled(
                    ids=tuple(ids),
                    scores=(0.5,) * 5,
                    references=(Reference("", 1),) * 5,
                    late=(),
                    spec=self.adapter.spec,
                    device=self.adapter.device,
                    dtype=self.adapter.dtype,
                    parts=tuple(self.parts[id] for id in ids),
                    tokens=5 * self.adapter.spec.tokens,
                    log_weights=(-0.1 * self.asked % 1,) * 5,
                )
            )
        return found

    def hint(self, *_: Any) -> None:
        """Nothing to look up."""

    def release(self, _: Stream) -> None:
        """Nothing is held."""


def decoding(tokenizer: Path, device: torch.device, *, tiny: bool) -> Iterator[Figure]:
    """Tokens per second of each case, beside the engine without memories and the library's compiled loop."""
    dtype = torch.float32 if tiny else torch.bfloat16
    new_tokens = 24 if tiny else 256
    for name, shape in SHAPES.items():
        model = _model(TINY if tiny else shape, tokenizer, device, dtype)
        cases = [case for case in CASES if case.shape == name][: 2 if tiny else None]
        for case in cases:
            memory = MemoryConfig(layers="first-half", tokens_per_head=8) if case.sparse else MemoryConfig()
            adapter = TransformersAdapter(
                model, AutoTokenizer.from_pretrained(tokenizer), memory, name, rows=case.batch
            )
            adapter.stop_tokens = frozenset()
            title = f"{name}, batch {case.batch}, {'sparse' if case.sparse else 'dense'}"
            speeds: dict[str, list[float]] = {"memories": [], "none": [], "compiled": []}
            given, baseline, graphs = RandomMemories(adapter), adapter.baseline(), 0
            for number in range(2 if tiny else _ROUNDS + 1):
                for way, some in speeds.items():
                    if way == "compiled" and case.compiled is None:
                        continue
                    prompts = [Prompt("the statement of a loop " + "again " * row) for row in range(case.batch)]
                    if way == "compiled":
                        speed = _compiled(baseline, prompts, new_tokens)
                    else:
                        speed = _engine(adapter, given if way == "memories" else None, prompts, new_tokens)
                    some += [speed] if number else []
                    graphs = len(getattr(adapter.engine._runner._run, "_captured", ()))  # type: ignore[attr-defined]
            medians = {way: statistics.median(some) for way, some in speeds.items() if some}
            yield Figure(f"{title}: tokens/s", medians["memories"], details=str(speeds))
            kept = medians["memories"] / medians["none"]
            yield Figure(f"{title}: kept of the same without memories", kept, least=None if tiny else case.kept)
            if case.compiled is not None:
                times = medians["memories"] / medians["compiled"]
                yield Figure(f"{title}: of the library's compiled loop", times, least=None if tiny else case.compiled)
            if device.type == "cuda":
                yield Figure(f"{title}: graphs", graphs, least=1)
            adapter.engine.close()
        yield _fused(model, AutoTokenizer.from_pretrained(tokenizer), name, device, new_tokens)
        del model


def _fused(model: Any, tokenizer: Any, name: str, device: torch.device, new_tokens: int) -> Figure:
    """What compiled layers are worth at batch 1, without memories. The model's layers stay compiled."""
    speeds: dict[bool, list[float]] = {}
    for compiled in (False, True):
        if compiled:
            fuse(model, "inductor" if device.type == "cuda" else "eager")
        adapter = TransformersAdapter(model, tokenizer, MemoryConfig(), name, rows=1)
        adapter.stop_tokens = frozenset()
        prompts = [Prompt("the statement of a loop")]
        speeds[compiled] = [_engine(adapter, None, prompts, new_tokens) for _ in range(_ROUNDS + 1)][1:]
        adapter.engine.close()
    times = statistics.median(speeds[True]) / statistics.median(speeds[False])
    return Figure(f"{name}, batch 1: with compiled layers, of the same without", times, details=str(speeds))


def _model(shape: Shape, tokenizer: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama with random weights, made on the device."""
    config = llama(shape, max(shape.vocabulary, len(AutoTokenizer.from_pretrained(tokenizer))))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _compiled(baseline: TransformersBaseline, prompts: Sequence[Prompt], new_tokens: int) -> float:
    """Tokens per second of all sequences after the first token, by the library's loop with a static cache."""
    run = baseline.generate(prompts, new_tokens, "sdpa, static", 512)
    return len(prompts) * (new_tokens - 1) / (run.seconds - run.first_token_s)


def _engine(
    adapter: TransformersAdapter, given: RandomMemories | None, prompts: Sequence[Prompt], new_tokens: int
) -> float:
    """The same by the engine."""
    streams = None if given is None else [Stream(given, adapter.dtype) for _ in prompts]
    began = time.perf_counter()
    answers = adapter.generate(prompts, streams, GenerateConfig(max_new_tokens=new_tokens))
    seconds = time.perf_counter() - began - max(answer.first_token_s for answer in answers)
    return len(prompts) * (new_tokens - 1) / seconds
