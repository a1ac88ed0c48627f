"""`build`: synthetic banks of any size, with small blocks, and embeddings near those of real texts."""

import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.storage.home import Batch
from m3runtime.writing.writer import OnProgress

SPEC = MemorySpec(layers=(0,), kv_heads=1, tokens=4, head_dim=32, reference_tokens=4, dtype="float32")
"""Blocks of half a KiB, so that a million fit on a drive; search does not depend on them."""
CENTRES = 256
"""Number of real texts, near whose embeddings those of the memories lie."""
NOISE = 0.7
"""Length of the noise that is added to a centre; the cosine to it is then 0.8, as of texts about one subject."""
_WORDS = 48
_GROUP = 2048
"""Memories in one transaction."""


@dataclass(frozen=True, slots=True)
class Built:
    """The time to make a bank."""

    memories: int
    home_s: float
    """Seconds to make embeddings and blocks, and to commit them."""
    home_cpu_s: float
    """CPU seconds of that, of all threads."""
    compaction_s: float
    compaction_cpu_s: float
    index_s: float
    """Seconds to read the embeddings back and to index them."""
    index_cpu_s: float


def centres(embedder: Embedder) -> Embeddings:
    """Embeddings of real texts, for `build`."""
    return embedder.embed_references(_windows(CENTRES, seed=1))


def build(
    config: Config,
    embedder: Embedder,
    about: Embeddings,
    path: Path,
    size: int,
    progress: OnProgress,
    *,
    compact: bool = False,
) -> tuple[Bank, Built]:
    """A bank of ``size`` memories near ``about``, with a saved index, in a home of the configured kind.

    With ``compact`` the home is compacted before it is indexed.
    """
    title = f"Making {size:,} memories"
    progress(title, 0, size)
    times = [_now()]
    codec = RawCodec(SPEC)
    none = "0" * 32
    manifest = Manifest(
        model=none,
        model_name="none",
        tokenizer=none,
        sink="",
        spec=SPEC,
        codec_kind="raw",
        codec_options=dict(codec.options),
        codec=codec.fingerprint,
        embedder=embedder.fingerprint,
        embedder_name=config.embedder.path,
        dim=embedder.dim,
    )
    bank = Bank.create(path, assembly.open_home(config), manifest, codec)
    try:
        for start in range(0, size, _GROUP):
            count = min(_GROUP, size - start)
            bank.home.commit(_batch(bank, start, around(about, count, seed=start)))
            progress(title, start + count, size)
        times.append(_now())
        if compact:
            bank.home.compact()
        times.append(_now())
        assembly.update_indexes(config, bank)
        times.append(_now())
    except BaseException:
        bank.close()
        raise
    return bank, Built(size, *np.diff(times, axis=0).ravel().tolist())


def _now() -> tuple[float, float]:
    """Seconds of the wall, and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def around(centres: Embeddings, count: int, seed: int) -> Embeddings:
    """``float32[count, dim]``: rows of length 1, each near one of the centres."""
    drawing = np.random.default_rng(seed)
    noise = drawing.standard_normal((count, centres.shape[1]), np.float32) * (NOISE / centres.shape[1] ** 0.5)
    vectors = centres[drawing.integers(0, len(centres), count)] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # type: ignore[no-any-return]


def queries(count: int) -> list[str]:
    """Different real texts of about 64 tokens."""
    return _windows(count, seed=2)


def _batch(bank: Bank, start: int, vectors: Embeddings) -> Batch:
    ids = as_ids(range(start + 1, start + 1 + len(vectors)))
    shape = (len(ids), len(SPEC.layers), SPEC.kv_heads, SPEC.tokens, SPEC.head_dim)
    drawing = torch.Generator().manual_seed(start)
    keys, values = (torch.randn(shape, generator=drawing) for _ in range(2))
    memories = MemoryTensors(keys, values, torch.full((len(ids),), SPEC.tokens))
    references = [
        Reference(f"Memory {id} that nobody wrote.", 4, places=(Place(f"made/{id // 1000}", 0, 29),))
        for id in ids.tolist()
    ]
    return Batch(ids, bank.blocks(ids, memories), references, vectors)


def _windows(count: int, seed: int) -> list[str]:
    words, drawing = _words(), random.Random(seed)
    return [" ".join(words[start : start + _WORDS]) for start in drawing.sample(range(len(words) - _WORDS), count)]


@cache
def _words() -> list[str]:
    """The words of the Python language reference, which every installation has."""
    from pydoc_data.topics import topics

    return " ".join(topics[name] for name in sorted(topics)).split()
