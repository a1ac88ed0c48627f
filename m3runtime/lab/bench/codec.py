"""``m3 bench codec``: squared error at equal bytes, decoding speed, and size at rest, on memories of real texts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import zstandard
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.codecs import Codec
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.config.schema import Config
from m3runtime.errors import InputError
from m3runtime.lab.bench.codec_error import Error, errors
from m3runtime.lab.bench.codec_speed import Speed, decode_speed, filled
from m3runtime.lab.bench.timing import threads
from m3runtime.lab.results import Result, environment, plain
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.observe.figures import show_size
from m3runtime.writing.codec_files import configured
from m3runtime.writing.fitting import OnStep, fit_codec, join
from m3runtime.writing.writer import OnProgress

LEAST = 256
"""Fewest tokens of a sample, because faiss trains as many centroids."""
ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The settings of ``m3 bench codec``."""

    references: int = 128
    decoded: int = 5
    """MemoryTensors decoded in one call, as for a chunk."""
    layers: int = 2
    """Memory layers, evenly spread, to measure squared errors on; 0 for no errors."""
    rounds: int = 15
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class AtRest:
    """The mean size of a block of held-out memories, in bytes."""

    codec: str
    bytes: float
    zstd: float
    """The mean size if each block is compressed alone."""


@dataclass(frozen=True, slots=True)
class CodecBench(Result):
    """The results of ``m3 bench codec``."""

    settings: BenchSettings
    device: str
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    """Fingerprints of the model and of the configured codec."""
    errors: Mapping[int, Sequence[Error]]
    """Errors by bytes of a vector: faiss first, then ours."""
    speed: Speed
    at_rest: Sequence[AtRest]

    def to_json(self) -> dict[str, Any]:
        """All figures and their ratios, with software and machine, as JSON values."""
        return {
            "settings": plain(self.settings),
            "device": self.device,
            "config": plain(self.config),
            "fingerprints": plain(self.fingerprints),
            "squared_error": {
                str(size): [plain(row) | {"both": row.both} for row in listed] for size, listed in self.errors.items()
            },
            "error_ratios": {str(size): dict(ratios(listed)) for size, listed in self.errors.items()},
            "decoding": plain(self.speed),
            "decoding_ratios": speedups(self.speed),
            "at_rest": plain(self.at_rest),
            "environment": environment(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        error = Table("bytes of a vector", "codec", "keys", "values", "both", title="Relative squared error, held out")
        for size, listed in self.errors.items():
            for row in listed:
                error.add_row(f"{row.bytes:.1f}", row.codec, f"{row.keys:.4f}", f"{row.values:.4f}", f"{row.both:.4f}")
            for name, ratio in ratios(listed):
                error.add_row(str(size), f"{name}: over the best of faiss", "", "", f"{ratio:.3f}", end_section=True)
        if self.errors:
            yield error
        speed = self.speed
        title = f"Decoding {speed.memories} memories, {speed.tokens} tokens"
        times = Table("", "median (quartiles)", "of the copy", title=title)
        for name, spread in speed.times.items():
            times.add_row(name, str(spread), f"{spread.median / speed.limit(name):.1f}")
        yield times
        for name, ratio in speedups(speed).items():
            yield f"{name}: {ratio:.2f}"
        yield f"{show_size(speed.bytes)} written, on {self.device}, {self.settings.threads} threads"
        rest = Table("codec", "bytes a memory", "with zstd", "of it", title="At rest")
        for one in self.at_rest:
            rest.add_row(one.codec, f"{one.bytes:,.0f}", f"{one.zstd:,.0f}", f"{one.zstd / one.bytes:.3f}")
        yield rest


def ratios(listed: Sequence[Error]) -> list[tuple[str, float]]:
    """The error of each of ours over the least of faiss'."""
    best = min(row.both for row in listed if row.codec.startswith("faiss"))
    return [(row.codec, row.both / best) for row in listed if not row.codec.startswith("faiss")]


def speedups(speed: Speed) -> dict[str, float]:
    """Ratios of decoding times in float32: faiss over ours on the same codes, and ours over a copy of the result."""
    found = {}
    for name, spread in speed.times.items():
        scope = name.removeprefix("faiss sa_decode, ")
        if scope != name:
            ours = speed.times[f"product, {scope}, float32"]
            found[f"{scope}: faiss / ours"] = spread.median / ours.median
            found[f"{scope}: ours / copy of the result"] = ours.median / speed.limit("float32")
    return found


def bench_codec(
    config: Config, adapter: Adapter, texts: Sequence[str], settings: BenchSettings, progress: OnProgress
) -> CodecBench:
    """Encode some of these references, train on three quarters of them, and measure on the others.

    Raises `InputError` if there are too few.
    """
    drawn = random.Random(settings.seed).sample(sorted(texts), min(settings.references, len(texts)))
    cut = len(drawn) * 3 // 4
    tokens = sum(adapter.count_tokens(text) for text in drawn[:cut])
    if tokens < LEAST:
        raise InputError(f"a sample of {tokens} tokens is too small to measure on; give more texts, for {LEAST}")
    memories = _encode(adapter, drawn, config.memory.batch_size, partial(progress, "Computing memories"))
    sample, held_out = rows(memories, slice(0, cut)), rows(memories, slice(cut, None))
    with threads(settings.threads):
        found: Mapping[int, Sequence[Error]] = {}
        if settings.layers:
            spec, few = fewer_layers(adapter.spec, settings.layers)
            pair = (rows(sample, slice(None), few), rows(held_out, slice(None), few))
            found = errors(*pair, spec, settings.threads, partial(progress, "Measuring errors"))
        quarters = {scope: quarter(adapter.spec, sample, scope) for scope in ("head", "model")}
        ours = configured(config, adapter.spec)
        trained = partial(progress, "Training the codec")
        fit_codec(ours, adapter, drawn[:cut], config.memory.batch_size, trained)
        others: dict[str, Codec] = {f"configured ({config.codec.kind})": ours}
        others |= {"scalar int4": ScalarCodec(adapter.spec, 4), "raw float32": RawCodec(adapter.spec, "float32")}
        speed = decode_speed(
            quarters,
            others,
            filled(rows(held_out, slice(0, settings.decoded)), adapter.spec.tokens),
            adapter.device,
            settings.rounds,
            settings.threads,
            lambda done: progress("Measuring times", done, settings.rounds + 1),
        )
        stored: dict[str, Codec] = {
            "raw bfloat16": RawCodec(adapter.spec, "bfloat16"),
            "scalar int8": ScalarCodec(adapter.spec, 8),
            "scalar int4": ScalarCodec(adapter.spec, 4),
            "product, a quarter of a byte a channel": quarters["head"],
            f"configured ({config.codec.kind})": ours,
        }
        at_rest = [_at_rest(name, codec, held_out) for name, codec in stored.items()]
    prints = {"model": adapter.model_fingerprint, "codec": ours.fingerprint}
    return CodecBench(settings, str(adapter.device), config.model_dump(mode="json"), prints, found, speed, at_rest)


def quarter(spec: MemorySpec, sample: MemoryTensors, scope: str) -> ProductCodec:
    """A trained codec of a quarter of a byte per channel, whose codes faiss can decode too."""
    size = spec.head_dim // 4
    codec = ProductCodec(spec, key_bytes=size, value_bytes=size, scope=scope, rotation="none", offset=False)
    codec.fit(sample)
    return codec


def _at_rest(name: str, codec: Codec, memories: MemoryTensors) -> AtRest:
    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
    plainly = packed = 0
    for payload, tokens in zip(codec.encode(memories), memories.tokens.tolist(), strict=True):
        data = payload[: codec.payload_bytes(tokens)].numpy().tobytes()
        plainly += HEADER_BYTES + len(data)
        packed += HEADER_BYTES + min(len(data), len(compress(data)))
    return AtRest(name, plainly / len(memories), packed / len(memories))


def _encode(adapter: Adapter, texts: Sequence[str], batch: int, progress: OnStep) -> MemoryTensors:
    parts = []
    for start in range(0, len(texts), batch):
        progress(start, len(texts))
        parts.append(adapter.encode(texts[start : start + batch]))
    progress(len(texts), len(texts))
    joined = join(parts)
    return MemoryTensors(joined.keys.float(), joined.values.float(), joined.tokens)


def fewer_layers(spec: MemorySpec, count: int) -> tuple[MemorySpec, Tensor]:
    """The spec of ``count`` evenly spread layers, and their places among all."""
    all_of_them = len(spec.layers)
    count = min(count, all_of_them)
    chosen = [(2 * i + 1) * all_of_them // (2 * count) for i in range(count)]
    return replace(spec, layers=tuple(spec.layers[i] for i in chosen)), torch.tensor(chosen)


def rows(memories: MemoryTensors, which: slice, layers: Tensor | None = None) -> MemoryTensors:
    """A slice of memories, with some of their layers."""
    keys, values = memories.keys[which], memories.values[which]
    if layers is not None:
        keys, values = keys[:, layers], values[:, layers]
    return MemoryTensors(keys, values, memories.tokens[which])
