"""Checks this source tree on a GPU, in at most four minutes: one table, and one JSON file with each figure's target.

It needs no installation (see ``run.sh``) and no model hub: the models have the shapes of SmolLM2-135M and MiniLM, and
random weights. With ``--tiny --device cpu`` the same runs anywhere in seconds, without targets of speed.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "model")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # or a library that asks for devices would forbid forking

import faiss  # noqa: E402, F401 - before usearch, see tests/conftest.py
import numpy as np  # noqa: E402
import sentence_transformers  # noqa: E402, F401 - once here, and not in each check
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

import m3model.transformers  # noqa: E402, F401
from m3backends.slabs import GpuTier, PinnedTier  # noqa: E402
from m3runtime import assembly  # noqa: E402
from m3runtime.codecs.product.codec import ProductCodec  # noqa: E402
from m3runtime.config.schema import Config  # noqa: E402
from m3runtime.device.resolve import resolve  # noqa: E402
from m3runtime.documents.document import Document  # noqa: E402
from m3runtime.lab.bench.banks import full_pieces  # noqa: E402
from m3runtime.lab.bench.write import PLAIN, WriteSettings, bench_write  # noqa: E402
from m3runtime.memory.block import as_ids  # noqa: E402
from m3runtime.memory.spec import MemorySpec  # noqa: E402
from m3runtime.memory.tensors import MemoryTensors  # noqa: E402
from m3runtime.runtime import Runtime  # noqa: E402
from m3runtime.storage.tier import CachingTier  # noqa: E402
from m3runtime.writing.fitting import fit_codec  # noqa: E402
from m3runtime.writing.writer import Writer  # noqa: E402
from tests.gpu import report  # noqa: E402
from tests.gpu.decoding import decoding  # noqa: E402
from tests.gpu.models import REAL, TINY, make_embedder, make_model, topics  # noqa: E402
from tests.gpu.report import Check, Figure  # noqa: E402
from tests.gpu.training import training  # noqa: E402
from tests.gpu.transforms import made_transform  # noqa: E402

DECODED = {5: 0.46, 40: 2.95, 160: 10.9}
"""Memories, and the milliseconds in which an H100 decoded them at 1f7c192."""
SUITES = ("tests/gpu", "tests/core", "tests/backends", "tests/model")
_OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)|(tests/\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)")
"""A line of pytest's, with processes (``-n``) or without."""
TINY_SUITE = "tests/gpu/test_slab.py"
"""One that imports no model."""


@dataclass(frozen=True)
class Place:
    """The input of every check. Forked children inherit it; nothing here has touched the device."""

    folder: Path
    device: str
    tiny: bool

    @property
    def config(self) -> Config:
        """The configuration of the bank that `write` makes and the others read."""
        values: dict[str, Any] = {
            "bank": self.folder / "bank",
            "model": {"path": str(self.folder / "model"), "device": self.device},
            "memory": {"reference_tokens": 24 if self.tiny else 128},
            "embedder": {"path": str(self.folder / "embedder")},
            "tiers": [
                *([{"kind": "gpu", "capacity": "512MiB"}] if self.device != "cpu" else []),
                {"kind": "pinned", "capacity": "16MiB" if self.tiny else "512MiB"},
                {"kind": "lmdb"},
            ],
            "recall": {
                "min_score": -1,
                "when_late": "wait",
                "chunk_tokens": 16 if self.tiny else 64,
                "decoded": "4MiB" if self.tiny else "256MiB",
            },
        }
        values["recall"]["lookahead_tokens"] = values["recall"]["chunk_tokens"] // 4
        if self.tiny:
            values["codec"] = {"kind": "scalar"}
        elif (file := self.folder / "codec.safetensors").exists():
            values["codec"] = {"kind": "product", "file": file}
        return Config.model_validate(values)

    def most(self, figure: float) -> float | None:
        """A target of speed: there is none for tiny shapes."""
        return None if self.tiny else figure

    def texts(self, count: int) -> list[str]:
        """Queries of about 64 tokens."""
        words = " ".join(topics()).split()
        return [" ".join(words[start : start + 45]) for start in range(1000, 1000 + 300 * count, 300)]


# -- the checks -----------------------------------------------------------------------------------------------------


def suite(place: Place) -> Iterator[Figure]:
    """The tests that need a device."""
    options = [
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--basetemp",
        str(place.folder / "tests"),
    ]
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set(), "SKIPPED": set()}
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(["-n", "0", TINY_SUITE] if place.tiny else ["-n", "8", *SUITES])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        stop = threading.Timer(85, os.killpg, (process.pid, signal.SIGKILL))
        stop.start()
        for line in process.stdout:
            lines.append(line)
            if outcome := _OUTCOME.search(line):
                found[outcome[1] or outcome[4]].add(outcome[2] or outcome[3])
        stop.cancel()
    bad = found["FAILED"] | found["ERROR"]
    (place.folder.parent / "suite.log").write_text("".join(lines), encoding="utf-8")
    yield Figure(
        "tests that passed", len(found["PASSED"]), least=None if place.tiny else 80, details="".join(lines[-60:])
    )
    yield Figure("tests that failed", len(bad), most=0, details="\n".join(sorted(bad)))
    yield Figure("tests that were skipped", len(found["SKIPPED"]), details="\n".join(sorted(found["SKIPPED"])))
    yield Figure("tests that were found", sum(map(len, found.values())), least=1)
    yield Figure("pytest's exit status", process.returncode, most=0)


def write(place: Place) -> Iterator[Figure]:
    """A bank of full references; every later check reads it."""
    shape = TINY if place.tiny else REAL
    make_model(place.folder / "model", shape, torch.float32 if place.tiny else torch.bfloat16)
    make_embedder(place.folder / "embedder", shape)
    config = place.config
    adapter, embedder = assembly.open_adapter(config), assembly.open_embedder(config)
    documents = [Document(f"topic-{number}", text) for number, text in enumerate(topics())]
    pieces = full_pieces(adapter, documents, 24 if place.tiny else 256)
    if not place.tiny:  # so few references would stay in int8
        began = time.perf_counter()
        fitted = assembly.make_codec(config, adapter.spec)
        fit_codec(fitted, adapter, [one.text for one in pieces[:64]], config.memory.batch_size)
        fitted.save(place.folder / "codec.safetensors")
        yield Figure("seconds of training the codec", time.perf_counter() - began, "s")
        config = place.config
    wrote = Writer(config, adapter, embedder).write(pieces, whole=True)
    embedder.close()
    yield Figure("references written", wrote.written, least=len(pieces))
    yield Figure("seconds of writing", wrote.seconds, "s", details=str(dict(wrote.phases)))
    asked = WriteSettings(references=len(pieces), rounds=1 if place.tiny else 3, threads=torch.get_num_threads())
    found = bench_write(config, adapter, [], asked, lambda *_: None)
    yield Figure("prefill kept by writing", found.kept[PLAIN].median, least=place.most(0.7), details=str(found.shares))


def decode(place: Place) -> Iterator[Figure]:
    """The engine on larger shapes than the bank's."""
    yield from decoding(place.folder / "model", resolve(place.device), tiny=place.tiny)


def train(place: Place) -> Iterator[Figure]:
    """Training to read memories."""
    yield from training(resolve(place.device), tiny=place.tiny)


def codec(place: Place) -> Iterator[Figure]:
    """Decoding of the default codec, against the CPU and against a copy of what it writes."""
    device, config = resolve(place.device), place.config
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        ids = bank.home.ids()[:16]
        blocks = torch.empty(len(ids), bank.home.slot_bytes, dtype=torch.uint8)
        assert bank.home.read(ids, blocks).all()
        right = bank.decode(blocks, torch.float32)
        for dtype, most in ((torch.float32, 2e-3), (torch.bfloat16, 2**-7)):
            mine = bank.decode(blocks.to(device), dtype)
            for name in ("keys", "values"):
                ours, theirs = getattr(mine, name).cpu().float(), getattr(right, name)
                error = float((ours - theirs).norm() / theirs.norm())
                yield Figure(f"{name} in {dtype}: difference from the CPU's", error, "of their norm", most=most)
        dtype = torch.float32 if place.tiny else torch.bfloat16
        for count, limit in DECODED.items():
            some = blocks[torch.arange(count) % len(blocks)].to(device)
            written = bank.decode(some, dtype).keys
            source, target = (torch.empty(2, *written.shape, dtype=dtype, device=device) for _ in range(2))
            copied = milliseconds(partial(target.copy_, source), device)
            took = milliseconds(partial(bank.decode, some, dtype), device)
            yield Figure(f"decode {count}", took, "ms", most=place.most(limit))
            yield Figure(f"decode {count} / a copy of what it writes", took / copied, "times")
            if count == 5:
                memories = bank.decode(some, torch.float32)
                encoded = milliseconds(partial(bank.codec.encode, memories), device, rounds=5)
                yield Figure("encode 5", encoded, "ms", most=place.most(15))
    yield from _dense(place, device)


def _dense(place: Place, device: torch.device) -> Iterator[Figure]:
    """The default codec on the shape of Llama-3-8B, whose 64 steps of 32 sequences take about 640 ms."""
    layers, heads, tokens, dim, count = (2, 2, 8, 16, 3) if place.tiny else (32, 8, 128, 128, 160)
    quantiser = made_transform(MemorySpec(tuple(range(layers)), heads, tokens, dim, tokens, "bfloat16")).to(device)
    codes = torch.randint(256, (count, tokens * quantiser.token_bytes), dtype=torch.uint8, device=device)
    decoded = milliseconds(partial(quantiser.decode, codes, tokens, torch.bfloat16), device, rounds=5)
    yield Figure(f"decode {count} dense memories of 8b", decoded, "ms", most=place.most(32))
    some = [torch.randn(layers * heads, 16 * tokens, dim, device=device) for _ in range(2)]
    rows = torch.zeros(16, codes.shape[1], dtype=torch.uint8, device=device)

    def encode() -> None:
        quantiser.encode_all((some[0].clone(), some[1].clone()), [tokens] * 16, rows)

    yield Figure("encode 16 dense memories of 8b", milliseconds(encode, device, rounds=3), "ms", most=place.most(200))


def tiers(place: Place) -> Iterator[Figure]:
    """Reading of caching tiers into the device, against plain copies of the same bytes; capacity exact."""
    device = resolve(place.device)
    slot = 4096 if place.tiny else 1_500_160
    batches, slots = (5, 32), 48
    ids = as_ids(range(slots))
    source = torch.randint(256, (slots, slot), dtype=torch.uint8, device=device)
    out = torch.zeros(max(batches), slot, dtype=torch.uint8, device=device)
    plain = torch.zeros(max(batches), slot, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for kind, beside in ((GpuTier, source), (PinnedTier, plain)):
        tier: CachingTier = kind(slot_bytes=slot, capacity=slots * slot + slot // 2, device=device)
        with tier:
            tier.write(ids, source)
            for batch in batches:
                copied = milliseconds(partial(out[:batch].copy_, beside[:batch], non_blocking=True), device)
                drawn = as_ids(np.random.default_rng(0).permutation(slots)[:batch].tolist())
                took = milliseconds(partial(tier.read, drawn, out[:batch]), device)
                assert tier.read(drawn, out[:batch]).all()
                wrong = int((out[:batch] != source[torch.from_numpy(drawn.astype(np.int64)).to(device)]).sum())
                yield Figure(f"{tier.name}: wrong bytes of {batch}", wrong, most=0)
                name = f"{tier.name}: read {batch}"
                yield Figure(name, took, "ms")
                yield Figure(f"{name} / a plain copy", took / copied, "times", most=place.most(2.0))


def recall(place: Place) -> Iterator[Figure]:
    """A recall whose memories are all in the store, against the embedding of its query."""
    device, config = resolve(place.device), place.config
    texts = place.texts(12 if place.tiny else 36)
    with Runtime.open(config) as runtime:
        cold, warm, embedded = [], [], []
        for text in texts[::3]:
            with runtime.stream() as stream:
                cold.append(seconds(partial(stream.recall, text), device))
        runtime.fetch(runtime.bank.home.ids(), getattr(torch, runtime.bank.manifest.spec.dtype))
        before = runtime.metrics().store.decoded
        for text in [*texts[1::3], *texts[2::3]]:  # new texts: an embedding that is known would be no measure
            with runtime.stream() as stream:
                wait(device)
                began = time.perf_counter()
                embedded.append(stream.recall(text).phases["embed"])
                wait(device)
                warm.append(time.perf_counter() - began)
        ratios = [whole / embed for whole, embed in zip(warm, embedded, strict=True)]
        yield Figure("memories decoded by warm recalls", runtime.metrics().store.decoded - before, most=0)
        yield Figure("embedding of a query", 1e3 * statistics.median(embedded), "ms")
        yield Figure("cold recall of 5", 1e3 * statistics.median(cold), "ms")
        yield Figure("warm recall of 5", 1e3 * statistics.median(warm), "ms")
        yield Figure("warm recall / embedding", statistics.median(ratios), "times", most=place.most(1.3))


def sharing(place: Place) -> Iterator[Figure]:
    """64 streams in 8 threads, each thread on a CUDA stream of its own, share at most 20 memories."""
    device, config, threads, each, texts = resolve(place.device), place.config, 8, 8, place.texts(4)
    with Runtime.open(config) as runtime, ExitStack() as opened:
        spec, dtype = runtime.bank.manifest.spec, getattr(torch, runtime.bank.manifest.spec.dtype)
        right: dict[int, Tensor] = {}
        for matches in runtime.search(texts):
            ids = as_ids([match.id for match in matches])
            blocks = torch.empty(len(ids), runtime.bank.home.slot_bytes, dtype=torch.uint8)
            runtime.bank.home.read(ids, blocks)
            for id, block in zip(ids.tolist(), blocks, strict=True):
                right[id] = runtime.bank.decode(block[None].to(device), dtype).keys[0, 0]
        decoded: list[int] = []
        decode = runtime.bank.codec.decode

        def counted(payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
            decoded.append(len(payloads))
            return decode(payloads, tokens, dtype)

        runtime.bank.codec.decode = counted  # type: ignore[method-assign]
        streams = [[opened.enter_context(runtime.stream()) for _ in range(each)] for _ in range(threads)]
        wrong, errors = [0], list[BaseException]()
        start = threading.Barrier(threads)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def work(number: int) -> None:
            try:
                with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else ExitStack():
                    for turn in range(len(texts)):
                        start.wait(30)
                        own = [texts[(number + turn + row) % len(texts)] for row in range(each)]
                        for stream in runtime.recall(streams[number], own, wait=True):
                            keys, _ = stream.layer(spec.layers[0])
                            tokens = np.concatenate([[0], np.cumsum([right[id].shape[1] for id in stream.ids])])
                            for at, id in enumerate(stream.ids):
                                part = keys[:, tokens[at] : tokens[at + 1]]
                                wrong[0] += int((part != right[id]).sum())
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                start.abort()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.perf_counter() - began
        details = str(asdict(runtime.metrics()))
        if errors:
            raise errors[0]
        shared = len(right)
        yield Figure("memories shared", shared, most=20)
        yield Figure("memories decoded", sum(decoded), most=shared, details=details)
        yield Figure("wrong numbers", wrong[0], most=0)
        yield Figure("bytes in the store", runtime.metrics().store.bytes, most=runtime.store.capacity)
        yield Figure("a recall of 8 streams, 8 threads at once", 1e3 * took / len(texts), "ms")
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            allowed = (config.recall.decoded or 0) + 2**28  # blocks, and what decoding them takes for a moment
            yield Figure("device memory at most", peak / 2**20, "MiB", most=allowed / 2**20)


def preset(place: Place) -> Iterator[Figure]:
    """The paper's codec encodes what lies on the device, and the same bytes as on the CPU."""
    device = resolve(place.device)
    layers, options = (1, {"keys": "2x8+4x8", "values": "2x8+4x8", "scope": "model", "rotation": "opq"})
    if not place.tiny:
        layers, options = 15, {"preset": "memory3"}
    spec = MemorySpec(tuple(range(layers)), 3, 8, 64, 128, "bfloat16")
    random = torch.Generator().manual_seed(0)
    count = 16 if place.tiny else 48  # more vectors than centroids
    keys, values = (torch.randn(count, layers, 3, 8, 64, generator=random) for _ in range(2))
    sample = MemoryTensors(keys, values, torch.full((count,), 8))
    codec = ProductCodec(spec, **options)
    began = time.perf_counter()
    codec.fit(sample)
    yield Figure("seconds of training", time.perf_counter() - began, "s")
    some = MemoryTensors(keys[:16].to(device), values[:16].to(device), sample.tokens[:16])
    there = codec.encode(some)
    here = codec.encode(MemoryTensors(keys[:16], values[:16], sample.tokens[:16]))
    yield Figure("bytes that differ from the CPU's", float((there != here).float().mean()), "share", most=0.01)
    yield Figure("encode 16", milliseconds(lambda: codec.encode(some), device, rounds=3), "ms")


CHECKS: Sequence[Check[Place]] = (
    Check("suite", suite, 90),
    Check("write", write, 60),
    Check("decode", decode, 120),
    Check("codec", codec, 30),
    Check("train", train, 90),
    Check("tiers", tiers, 20),
    Check("recall", recall, 30),
    Check("sharing", sharing, 30),
    Check("preset", preset, 50),
)


# -- times ----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what ``work`` queued."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def milliseconds(work: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """The median of some rounds, after two to warm up."""
    return 1e3 * statistics.median([seconds(work, device) for _ in range(rounds + 2)][2:])


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def about(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Machine and versions; asked in a child, since a parent that touched the device cannot fork."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version}
    return {**found, "arguments": vars(arguments) | {"out": str(arguments.out)}, "cores": os.cpu_count()}


def machine(place: Place) -> Iterator[Figure]:
    """What this runs on."""
    device = resolve(place.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    yield Figure(f"{device}: {name}")


def main() -> int:
    """Returns 1 if anything failed or fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for check.json and check.txt")
    parser.add_argument("--device", default="auto", help="as model.device")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, no targets of speed")
    parser.add_argument("--seconds", type=float, default=230.0, help="when to stop")
    parser.add_argument("--only", nargs="*", help=f"some of {', '.join(check.name for check in CHECKS)}")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="m3-check-") as folder:
        place = Place(Path(folder, "work"), arguments.device, arguments.tiny)
        place.folder.mkdir()
        chosen = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
        found = report.run([Check("machine", machine, 20)], place, ends)
        can_fork = all(one.error is None for one in found["machine"])  # not if something here touched the device
        if not can_fork:  # each check imports all that it needs
            chosen = [replace(check, seconds=check.seconds + 15) for check in chosen]
        found |= report.run(chosen, place, ends, "fork" if can_fork else "spawn")
        log = Path(folder, "suite.log")
        if log.exists():
            log.rename(arguments.out / "suite.log")
    text = report.table(found)
    report.say(text)
    (arguments.out / "check.txt").write_text(text + "\n", encoding="utf-8")
    report.write(arguments.out / "check.json", found, dict(about(arguments)))
    short = report.short(found)
    report.say(f"{len(short)} fell short or failed: {', '.join(short) or 'none'}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
