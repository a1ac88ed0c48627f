"""A small real bank, and a runtime over it."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import PinnedTier
from m3backends.usearch.index import UsearchIndex
from m3model.transformers import TransformersAdapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.memory.block import Found, Ids, as_ids
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.retrieval.retriever import Retriever
from m3runtime.runtime import Runtime
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.home import Batch

CHUNK = 8
DIM = 64


class TrigramEmbedder(Embedder):
    """Counts of character trigrams, hashed into `DIM` places: texts that share words are near."""

    dim = DIM
    fingerprint = "7" * 32

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        return np.stack([self._embed(text) for text in texts])

    embed_queries = embed_references

    def _embed(self, text: str) -> Embeddings:
        text = f"  {text} "
        vector = np.full(DIM, 0.01, np.float32)
        for start in range(len(text) - 2):
            vector[xxhash.xxh3_64_intdigest(text[start : start + 3].encode()) % DIM] += 1
        return vector / np.linalg.norm(vector)


class GatedHome(LmdbHome):
    """A home that is as slow as a test wants: while the gate is shut, reading blocks waits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()

    def read(self, ids: Ids, out: Tensor) -> Found:
        self.gate.wait()
        return super().read(ids, out)


def make_runtime(
    adapter: TransformersAdapter,
    path: Path,
    texts: Sequence[str],
    *,
    home: type[LmdbHome] = LmdbHome,
    blocks: int = 6,
    generate: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    serve: dict[str, Any] | None = None,
    sources: Sequence[str] | None = None,
    **recall: Any,
) -> Runtime:
    """A bank that remembers ``texts`` exactly, under a page-locked tier with room for ``blocks`` blocks.

    ``sources`` has the source of each text, or several with commas between them.
    """
    defaults = {"chunk_tokens": CHUNK, "memories": 2, "min_score": -1, "lookahead_tokens": 3, "when_late": "wait"}
    config = Config.model_validate(
        {
            "bank": path,
            "model": model or {"path": "given"},
            "embedder": {"path": "given"},
            "memory": adapter.memory.model_dump(),
            "recall": {**defaults, **recall},
            "generate": generate or {},
            "serve": serve or {},
        }
    )
    embedder, codec = TrigramEmbedder(), RawCodec(adapter.spec)
    manifest = Manifest(
        model=adapter.model_fingerprint,
        model_name=adapter.name,
        tokenizer=adapter.tokenizer_fingerprint,
        sink=adapter.sink,
        spec=adapter.spec,
        codec_kind=codec.kind,
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder=embedder.fingerprint,
        embedder_name="trigrams",
        dim=embedder.dim,
        model_settings=dict(adapter.model_settings),
    )
    bank = Bank.create(path, home, manifest, codec)
    memories = adapter.encode(texts)
    ids = as_ids(range(bank.home.next_id(), bank.home.next_id() + len(texts)))
    references = [
        Reference(text, int(tokens), places=tuple(Place(one, 0, len(text)) for one in source.split(",")))
        for text, tokens, source in zip(texts, memories.tokens, sources or ["book.txt"] * len(texts), strict=True)
    ]
    vectors = embedder.embed_references(texts)
    bank.home.commit(Batch(ids, bank.blocks(ids, memories), references, vectors))
    index = UsearchIndex(dim=DIM, dtype="f32")
    index.add(ids, vectors)
    slot = bank.home.slot_bytes
    hierarchy = Hierarchy([PinnedTier(slot_bytes=slot, capacity=blocks * slot)], bank.home, bank.stamp)
    wanted = config.recall
    retriever = Retriever(embedder, index, memories=wanted.memories, min_score=wanted.min_score, margin=wanted.margin)
    return Runtime(config, bank, hierarchy, retriever, adapter.device)
