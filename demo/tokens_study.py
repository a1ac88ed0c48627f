"""Fewer tokens, or fewer bits? The bytes of a memory against the likelihood of the right answer.

``make quality NAME=tokens`` runs it on SmolLM2-135M and writes docs/quality/tokens. Tokens are kept by both values of
``memory.select_by``, and blocks are coded in 8 and in 4 bits. The five memories of a question are those that its search
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
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.lab.evaluation.trials import Trials, changed
from m3runtime.lab.evaluation.world import World, make_world
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.recall.lease import Part

SEED = 6
"""No setting was chosen on its questions."""
REFERENCES, QUESTIONS = 64, 56
METHODS = ("attention", "repeat")
COUNTS = (16, 32, 64)
BITS = (8, 4)
BATCH = 16


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    method: str
    tokens: int | None
    """None: all."""
    bits: int
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


def coded(memory: MemoryTensors, codec: ScalarCodec) -> tuple[Part, int]:
    """A memory after its codec, and the size of its block."""
    back = codec.decode(codec.encode(memory), memory.tokens, memory.keys.dtype)
    return (back.keys[0], back.values[0]), HEADER_BYTES + codec.payload_bytes(int(memory.tokens))


def curve(config: Config, adapter: TransformersAdapter, world: World, progress: Any) -> list[Point]:
    """All points."""
    trials = Trials(config, adapter, world, batch=BATCH)
    points = []
    for method in METHODS:
        chosen = cast(TransformersAdapter, adapter.with_memory(changed(config, {"memory.select_by": method}).memory))
        progress(f"{method}: memories", 0, 1)
        memories = list(encoded(chosen, world.references))
        # All tokens are the same memory by either method.
        tried = [(count, bits) for count in (*COUNTS, None) for bits in BITS if count or method == METHODS[0]]
        for done, (count, bits) in enumerate(tried):
            progress(f"{method}: questions", done, len(tried))
            codec = ScalarCodec(adapter.spec, bits=bits)
            kept = [memory if count is None else select(memory, scores, count) for memory, scores in memories]
            both = [coded(one, codec) for one in kept]
            parts: Mapping[int, Part] = dict(enumerate(part for part, _ in both))
            size = float(np.mean([one for _, one in both]))
            points.append(Point(method, count, bits, size, tuple(trials.likelihoods(parts))))
    return points


def main(config: Config, corpus: Path, out: Path, command: str) -> None:  # noqa: ARG001 - as the other studies
    """Measure, and write the report into ``out``."""
    config = changed(config, {"model.dtype": "bfloat16"})  # half the time
    adapter = cast(TransformersAdapter, assembly.open_adapter(config))
    world = make_world(SEED, references=REFERENCES, questions=QUESTIONS, unanswerable=0)
    with progress_bars(shown=sys.stderr.isatty()) as progress, torch.inference_mode():
        points = curve(config, adapter, world, progress)
    report(points, config, adapter, command).save(out)


def report(points: Sequence[Point], config: Config, adapter: TransformersAdapter, command: str) -> Report:
    """The curve as a table and a picture."""
    whole = next(point for point in points if point.tokens is None and point.bits == 8)
    rows = [
        (one.method if one.tokens else "-", one.tokens or "all", one.bits, f"{one.bytes:,.0f}",
         mean(one.log_probs, SEED), difference(whole.log_probs, one.log_probs, SEED))
        for one in sorted(points, key=lambda one: -one.bytes)
    ]  # fmt: skip
    lines = []
    for method in METHODS:
        for bits in BITS:
            some = sorted(
                (one for one in points if one.method == method and one.bits == bits), key=lambda one: one.bytes
            )
            lost = tuple(difference(whole.log_probs, one.log_probs, SEED) for one in some)
            lines.append(Series(f"{method}, {bits} bits", lost, tuple(one.bytes / 1e6 for one in some)))
    columns = ("kept by", "tokens", "bits", "bytes of a memory", "log-likelihood of the right answer", "lost")
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
