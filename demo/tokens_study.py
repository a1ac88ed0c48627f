"""Fewer tokens, or fewer bits? The bytes of a memory against the likelihood of the right answer.

``make quality NAME=tokens`` runs it on SmolLM2-135M and writes docs/quality/tokens. Tokens are kept by both values of
``memory.select_by``, as many in each head or by budgets that are fitted to the same references. Blocks are coded in 8
and in 4 bits, and by the product codec if it is configured. The five memories of a question are those that its search
found, weighted as configured.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from m3model.adapter import TransformersAdapter
from m3model.attention.selection import select
from m3runtime import assembly
from m3runtime.cli.progress import progress_bars
from m3runtime.codecs import Codec
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.codecs.steps import Steps
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.budgets import fitted
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.lab.evaluation.trials import Trials, changed
from m3runtime.lab.evaluation.world import World, make_world
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.recall.lease import Part
from m3runtime.writing.fitting import join, weigh

SEED = 31
"""No setting was chosen on its questions, and the fitting of budgets was not either."""
REFERENCES, QUESTIONS = 64, 56
METHODS = ("attention", "repeat")
BUDGETS = "repeat, budgets"
COUNTS = (16, 32, 64)
BITS = (8, 4)
BYTES = (48, 24, 12)
"""Bytes of a key and a value of 64 channels, by the product codec."""
BATCH = 16


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    method: str
    tokens: int | None
    """On average over heads; None: all."""
    codec: str
    bytes: float
    """Mean size of a block."""
    log_probs: tuple[float, ...]


def encoded(adapter: TransformersAdapter, texts: Sequence[str]) -> Iterator[tuple[MemoryTensors, Tensor]]:
    """The memory of each text, of all its tokens, and the scores to select by."""
    for start in range(0, len(texts), BATCH):
        memories, scores = adapter.encode_scored(texts[start : start + BATCH])
        for row, count in enumerate(memories.tokens.tolist()):
            keys, values = memories.keys[row : row + 1, :, :, :count], memories.values[row : row + 1, :, :, :count]
            kept = MemoryTensors(keys.clone(), values.clone(), memories.tokens[row : row + 1])
            yield kept, scores[row : row + 1, :, :, :count].clone()


def coded(memory: MemoryTensors, codec: Codec) -> tuple[Part, int]:
    """A memory after its codec, and the size of its block."""
    back = codec.decode(codec.encode(memory), memory.tokens, memory.keys.dtype)
    return (back.keys[0], back.values[0]), HEADER_BYTES + codec.payload_bytes(int(memory.tokens))


class Study:
    """Asks the questions of one world, from memories that are kept and coded in many ways."""

    def __init__(self, config: Config, adapter: TransformersAdapter, world: World, progress: Any) -> None:
        self.points: list[Point] = []
        self._config, self._world, self._progress = config, world, progress
        self._trials = Trials(config, adapter, world, batch=BATCH)
        self._adapter = adapter

    def run(self) -> list[Point]:
        """All points."""
        for method in METHODS:
            self._progress(f"{method}: memories", 0, 1)
            chosen = self._with({"memory.select_by": method})
            memories = list(encoded(chosen, self._world.references))
            if method == METHODS[0]:  # all tokens are the same memory by either method
                self._ask(method, None, {}, [memory for memory, _ in memories])
            for count in COUNTS:
                changes: dict[str, Any] = {"memory.select_by": method, "memory.tokens_per_head": count}
                self._ask(method, count, changes, [select(memory, scores, count) for memory, scores in memories])
            if method == "repeat":
                for count in COUNTS:
                    budgets = fitted([scores[0] for _, scores in memories], count, self._config.memory.reference_tokens)
                    changes = {"memory.select_by": method, "memory.tokens_per_head": budgets.tolist()}
                    most = int(budgets.max())
                    kept = [select(memory, scores, most, None, budgets) for memory, scores in memories]
                    self._ask(BUDGETS, count, changes, kept)
        return self.points

    def _with(self, changes: Mapping[str, Any]) -> TransformersAdapter:
        return cast(TransformersAdapter, self._adapter.with_memory(changed(self._config, changes).memory))

    def _ask(
        self, method: str, count: int | None, changes: Mapping[str, Any], memories: Sequence[MemoryTensors]
    ) -> None:
        adapter = self._with(changes)
        codecs: list[tuple[str, Codec]] = [(f"int{bits}", ScalarCodec(adapter.spec, bits=bits)) for bits in BITS]
        if self._config.codec.kind == "product" and (method == BUDGETS or count is None):
            codecs += [(f"product, {size}", codec) for size, codec in self._trained(adapter, memories).items()]
        for done, (name, codec) in enumerate(codecs):
            self._progress(f"{method}, {count or 'all'} tokens: questions", done, len(codecs))
            both = [coded(one, codec) for one in memories]
            parts: Mapping[int, Part] = dict(enumerate(part for part, _ in both))
            size = float(np.mean([one for _, one in both]))
            self.points.append(Point(method, count, name, size, tuple(self._trials.likelihoods(parts, changes))))

    def _trained(self, adapter: TransformersAdapter, memories: Sequence[MemoryTensors]) -> dict[int, Codec]:
        """The product codec in several sizes, trained on these memories, as that of a bank is on its own."""
        sizes = [size * adapter.spec.head_dim // 64 for size in BYTES]
        codecs = {size: ProductCodec(adapter.spec, bytes=size) for size in sizes}
        first = codecs[sizes[0]]
        with torch.inference_mode(False):
            cost = weigh(first, adapter, self._world.references, BATCH, Steps(), lambda _: None)
            for codec in codecs.values():
                codec.fit(join(memories), cost)
        return dict(codecs)


def main(config: Config, corpus: Path, out: Path, command: str) -> None:  # noqa: ARG001 - as the other studies
    """Measure, and write the report into ``out``."""
    config = changed(config, {"model.dtype": "bfloat16"})  # half the time
    adapter = cast(TransformersAdapter, assembly.open_adapter(config))
    world = make_world(SEED, references=REFERENCES, questions=QUESTIONS, unanswerable=0)
    with progress_bars(shown=sys.stderr.isatty()) as progress, torch.inference_mode():
        points = Study(config, adapter, world, progress).run()
    report(points, config, adapter, command).save(out)


def report(points: Sequence[Point], config: Config, adapter: TransformersAdapter, command: str) -> Report:
    """The curve as a table and a picture."""
    whole = next(point for point in points if point.tokens is None and point.codec == "int8")
    rows = [
        (one.method if one.tokens else "-", one.tokens or "all", one.codec, f"{one.bytes:,.0f}",
         mean(one.log_probs, SEED), difference(whole.log_probs, one.log_probs, SEED))
        for one in sorted(points, key=lambda one: -one.bytes)
    ]  # fmt: skip
    kinds: dict[str, list[Point]] = {}
    for one in sorted(points, key=lambda one: one.bytes):
        if one.tokens is None or one.method == BUDGETS:
            kinds.setdefault(f"{one.tokens} by budgets" if one.tokens else "all tokens", []).append(one)
        elif one.codec == "int4":
            kinds.setdefault(f"each head as many, {one.method}, int4", []).append(one)
    lines = [
        Series(
            name,
            tuple(difference(whole.log_probs, one.log_probs, SEED) for one in some),
            tuple(one.bytes / 1e6 for one in some),
        )
        for name, some in kinds.items()
    ]
    columns = ("kept by", "tokens", "codec", "bytes of a memory", "log-likelihood of the right answer", "lost")
    return Report(
        title="Tokens and bits of a memory",
        command=command,
        settings={"seed": SEED, "references": REFERENCES, "questions": QUESTIONS},
        config=config.model_dump(mode="json"),
        fingerprints={"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint},
        summary=("Lost: log-likelihood of a token of the right answer, against all tokens in 8 bits.",),
        tables=(Table("Bytes against likelihood", columns, tuple(rows), "In brackets, 95 % of bootstrap resamples."),),
        plots=(Plot("tokens", "Tokens and bits", "log-likelihood lost", tuple(lines), x="MB of a memory"),),
        results={"points": [asdict(one) for one in points]},
    )
