"""Record the traces of docs/eviction.md and replay them: ``python demo/eviction_trace.py``. Takes minutes.

Retrieval is real: MiniLM over the topics of the Python language reference, cut into references, and queries that are
consecutive chunks of 64 tokens of the same topics, in eight streams that take turns. The memories are empty: no policy
looks into a block.
"""

import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import AutoTokenizer

import models
from m3runtime import assembly, cli
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Batch

FOLDER = Path(__file__).parent.parent / ".demo/eviction"
STREAMS = 8
CHUNK = 64
SESSIONS = 600
"""Sessions of the trace ``popular``; each reads at most `LONGEST` chunks."""
LONGEST = 16
SHARES = (0.05, 0.1, 0.2, 0.4)
"""Capacities, as shares of the bank."""
SPEC = MemorySpec(layers=(0,), kv_heads=1, tokens=1, head_dim=8, reference_tokens=128, dtype="float32")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(models.minilm())

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    chunks = {name: list(cut(tokenizer, text)) for name, text in sorted(topics.items())}
    embedder = assembly.open_embedder(configuration(None))
    texts = sorted({chunk for of_topic in chunks.values() for chunk in of_topic if chunk.strip()})
    known = dict(zip(texts, embedder.embed_queries(texts), strict=True))
    size = write_bank(embedder, Splitter(count, max_tokens=SPEC.reference_tokens))
    drawing = random.Random(0)
    names = drawing.sample(sorted(chunks), len(chunks))
    record("once", [chunks[name] for name in names], known)
    record("popular", list(popular(names, chunks, drawing)), known)
    for name in ("once", "popular"):
        room = [f"--capacity={max(1, round(share * size[0])) * size[1]}" for share in SHARES]
        sys.argv = ["m3", "bench", "eviction", f"--trace={FOLDER / name}.jsonl", *room]
        try:
            cli.main()
        except SystemExit as done:
            if done.code:
                raise


def cut(tokenizer: AutoTokenizer, text: str) -> Iterator[str]:
    """Consecutive chunks of a text."""
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for start in range(0, len(places), CHUNK):
        part = places[start : start + CHUNK]
        yield text[part[0][0] : part[-1][1]]


def popular(names: list[str], chunks: dict[str, list[str]], drawing: random.Random) -> Iterator[list[str]]:
    """Sessions that start anywhere in a topic; the n-th topic is n times as rare as the first."""
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    for name in drawing.choices(names, weights, k=SESSIONS):
        start = drawing.randrange(len(chunks[name]))
        yield chunks[name][start : start + LONGEST]


def configuration(trace: Path | None) -> Config:
    sections = {
        "bank": FOLDER / "bank",
        "model": {"path": "none"},
        "codec": {"kind": "raw"},
        "embedder": {"path": str(models.minilm())},
        "tiers": [{"kind": "pinned", "capacity": "1MiB"}, {"kind": "lmdb"}],
        "recall": {"memories": 5, "min_score": 0.3, "when_late": "wait", "trace": trace},
    }
    return Config.model_validate(sections)


class Known(Embedder):
    """The embedder of the bank with all queries embedded in advance, because most occur more than once."""

    def __init__(self, embedder: Embedder, vectors: Mapping[str, Embeddings]) -> None:
        self._embedder = embedder
        self._vectors = vectors

    @property
    def dim(self) -> int:
        return self._embedder.dim

    @property
    def fingerprint(self) -> str:
        return self._embedder.fingerprint

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        return self._embedder.embed_references(texts)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return np.stack([self._vectors[text] for text in texts])

    def close(self) -> None:
        self._embedder.close()


def write_bank(embedder: Embedder, splitter: Splitter) -> tuple[int, int]:
    """Write a bank of all topics; returns its number of references and the bytes of a slot."""
    config, codec = configuration(None), RawCodec(SPEC)
    documents = [Document(name, text) for name, text in sorted(topics.items())]
    with closing(ReferenceSpool(documents, splitter)) as spool:
        references = list(spool)
    manifest = Manifest(
        model="0" * 32,
        model_name="none",
        tokenizer="0" * 32,
        sink="",
        spec=SPEC,
        codec_kind="raw",
        codec_options=codec.options,
        codec=codec.fingerprint,
        embedder=embedder.fingerprint,
        embedder_name=config.embedder.path,
        dim=embedder.dim,
    )
    bank = Bank.create(config.bank, assembly.open_home(config), manifest, codec)
    zeros = torch.zeros(len(references), 1, 1, 1, SPEC.head_dim)
    memories = MemoryTensors(zeros, zeros, torch.ones(len(references), dtype=torch.int64))
    ids = as_ids(range(1, len(references) + 1))
    vectors = embedder.embed_references([one.text for one in references])
    bank.home.commit(Batch(ids, bank.blocks(ids, memories), references, vectors))
    slot = bank.home.slot_bytes
    bank.close()
    return len(references), slot


def record(name: str, sessions: list[list[str]], known: Mapping[str, Embeddings]) -> None:
    """Recall with streams that take turns, a chunk each; a stream begins the next session when one ends."""
    waiting = iter(sessions)
    with Runtime.open(configuration(FOLDER / f"{name}.jsonl")) as runtime:
        runtime.retriever.embedder = Known(runtime.retriever.embedder, known)
        turns = [iter(session) for _, session in zip(range(STREAMS), waiting, strict=False)]
        streams = [runtime.stream() for _ in turns]
        while turns:
            for number in range(len(turns) - 1, -1, -1):
                text = next(turns[number], None)
                if text is not None:
                    streams[number].recall(text)
                    continue
                streams[number].close()
                following = next(waiting, None)
                if following is None:
                    del turns[number], streams[number]
                else:
                    turns[number], streams[number] = iter(following), runtime.stream()


if __name__ == "__main__":
    main()
