"""A runtime over a small bank of random memories, whose embedder knows words and whose home may be wrapped."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import PinnedTier
from m3backends.usearch.index import UsearchIndex
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank, OpenHome
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import InputError
from m3runtime.memory.block import Found, Ids, as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.home import Batch, Home
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.wrapping import WrappedHome

DIM = 64
SPEC = MemorySpec(layers=(0, 1), kv_heads=2, tokens=6, head_dim=4, reference_tokens=6, dtype="float32")
PART_BYTES = 2 * 2 * 2 * 6 * 4 * 4
WORDS = [
    "lamp",
    "harbour",
    "ferry",
    "market",
    "bridge",
    "walnut",
    "oil",
    "stone",
    "river",
    "monday",
    "winter",
    "island",
]
TEXTS = [f"{one} {other}" for at, one in enumerate(WORDS) for other in WORDS[at + 1 : at + 4]]
BAD = "a text that cannot be embedded"


class WordEmbedder(Embedder):
    """Counts words. Notes every call, and may be held up."""

    dim = DIM
    fingerprint = "5" * 32

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        return np.stack([self._embed(text) for text in texts])

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        self.calls.append(tuple(texts))
        self.entered.release()
        self.gate.wait()
        if BAD in texts:
            raise InputError("this text cannot be embedded")
        return self.embed_references(texts)

    def _embed(self, text: str) -> Embeddings:
        vector = np.full(DIM, 0.01, np.float32)
        for word in text.split():
            vector[xxhash.xxh3_64_intdigest(word.encode()) % DIM] += 1
        return vector / np.linalg.norm(vector)


class GatedHome(WrappedHome):
    """Reading blocks waits while the gate is shut. Notes what is read."""

    def __init__(self, inner: Home) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.asked: list[tuple[int, ...]] = []

    def read(self, ids: Ids, out: Tensor) -> Found:
        self.asked.append(tuple(ids.tolist()))
        self.entered.release()
        self.gate.wait()
        return super().read(ids, out)


@contextmanager
def shut(gate: threading.Event) -> Iterator[None]:
    gate.clear()
    try:
        yield
    finally:
        gate.set()


def pinned(slots: int) -> Callable[[int], list[CachingTier]]:
    return lambda slot_bytes: [PinnedTier(slot_bytes=slot_bytes, capacity=slots * slot_bytes)]


def no_tiers(slot_bytes: int) -> list[CachingTier]:
    return []


class CountingCodec(RawCodec):
    """Notes how many memories each call decoded."""

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__(spec)
        self.decoded: list[int] = []

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        self.decoded.append(len(payloads))
        return super().decode(payloads, tokens, dtype)


class TextAdapter(Adapter):
    """Has the memories of `TEXTS`. Notes every call, and may be held up; refuses texts, and fails."""

    spec = SPEC
    name = "texts"
    model_fingerprint = "1" * 32
    tokenizer_fingerprint = "2" * 32
    sink = ""
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.refused: set[str] = set()
        self.failing: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self._inside = threading.Lock()

    @classmethod
    def open(cls, model: object, memory: object, device: object) -> "TextAdapter":
        return cls()

    def count_tokens(self, text: str) -> int:
        return int(memories().tokens[TEXTS.index(text)])

    def encode(self, references: Sequence[str]) -> MemoryTensors:
        assert self._inside.acquire(blocking=False), "one call at a time"
        try:
            self.calls.append(tuple(references))
            self.entered.release()
            self.gate.wait()
            if self.failing is not None:
                raise self.failing
            if self.refused.intersection(references):
                raise InputError("this text cannot be read")
            every, rows = memories(), [TEXTS.index(text) for text in references]
            return MemoryTensors(every.keys[rows], every.values[rows], every.tokens[rows])
        finally:
            self._inside.release()


def open_runtime(
    path: Path,
    *,
    tiers: Callable[[int], list[CachingTier]] | None = None,
    wrap: Callable[[Home], Home] = lambda home: home,
    sections: dict[str, Any] | None = None,
    device: str = "cpu",
    cold: Collection[int] = (),
    encoder: Adapter | None = None,
    home: OpenHome = LmdbHome,
    **recall: Any,
) -> Runtime:
    """A bank of `TEXTS` at ``path``, made if it is not there, under a tier with room for six blocks.

    The ids ``cold`` are only in its catalogue.
    """
    defaults = {"memories": 3, "min_score": -1, "when_late": "wait", "score_temperature": 1.0}
    given = {"bank": path, "model": {"path": "given"}, "embedder": {"path": "given"}}
    config = Config.model_validate({**given, "recall": {**defaults, **recall}, **(sections or {})})
    embedder, codec = WordEmbedder(), CountingCodec(SPEC)
    vectors = embedder.embed_references(TEXTS)
    manifest = Manifest(
        model="1" * 32,
        model_name="none",
        tokenizer="2" * 32,
        sink="",
        spec=SPEC,
        codec_kind=codec.kind,
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder=embedder.fingerprint,
        embedder_name="words",
        dim=DIM,
    )
    ids = as_ids(range(len(TEXTS)))
    if path.exists():
        bank = Bank.open(path, home, lambda *_: codec)
    else:
        bank = Bank.create(path, home, manifest, codec)
        blocks = bank.blocks(ids, memories())
        for is_cold, some in groupby(range(len(ids)), lambda id: id in cold):  # ids rise from call to call
            rows = list(some)
            given_references = [references()[row] for row in rows]
            if is_cold:
                bank.home.catalogue(ids[rows], given_references, vectors[rows])
            else:
                bank.home.commit(Batch(ids[rows], blocks[rows], given_references, vectors[rows]))
    cold_ids = as_ids([]) if config.recall.cold_start else bank.home.cold()
    bank.home = wrap(bank.home)
    index = UsearchIndex(dim=DIM, dtype="f32")
    index.add(ids, vectors)
    index.remove(cold_ids)
    hierarchy = Hierarchy((tiers or pinned(6))(bank.home.slot_bytes), bank.home, bank.stamp, device)
    wanted = config.recall
    retriever = Retriever(embedder, index, memories=wanted.memories, min_score=wanted.min_score, margin=wanted.margin)
    return Runtime(config, bank, hierarchy, retriever, torch.device(device), encoder=encoder)


def memories() -> MemoryTensors:
    """Those of `TEXTS`, of one to six tokens."""
    random = torch.Generator().manual_seed(7)
    shape = (len(TEXTS), len(SPEC.layers), SPEC.kv_heads, SPEC.tokens, SPEC.head_dim)
    tokens = torch.tensor([1 + number % SPEC.tokens for number in range(len(TEXTS))])
    return MemoryTensors(torch.randn(shape, generator=random), torch.randn(shape, generator=random), tokens)


def references() -> list[Reference]:
    counts = memories().tokens.tolist()
    return [
        Reference(text, count, places=(Place("words.txt", 0, len(text)),))
        for text, count in zip(TEXTS, counts, strict=True)
    ]


def embedder_of(runtime: Runtime) -> WordEmbedder:
    assert isinstance(runtime.retriever.embedder, WordEmbedder)
    return runtime.retriever.embedder


def home_of(runtime: Runtime) -> GatedHome:
    assert isinstance(runtime.bank.home, GatedHome)
    return runtime.bank.home


def decoded_by(runtime: Runtime) -> list[int]:
    assert isinstance(runtime.bank.codec, CountingCodec)
    return runtime.bank.codec.decoded
