"""`made_bank`: a temporary bank of random memories whose blocks have a wanted size. It needs no model."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import InputError
from m3runtime.memory.block import HEADER_BYTES, as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.storage.home import Batch
from m3runtime.writing.writer import OnProgress

_HEAD_DIM = 32
_TOKEN_BYTES = 2 * _HEAD_DIM * 2
"""A key and a value of float16."""
_DIM = 384
_GROUP = 16
"""Memories in one transaction, as many as `m3 write` commits."""


@contextmanager
def made_bank(config: Config, block_bytes: int, count: int, progress: OnProgress) -> Iterator[Config]:
    """This configuration with a bank of ``count`` memories, in a folder next to its own bank, removed at the end.

    Raises `InputError` for blocks that are too small or too large.
    """
    tokens = (block_bytes - HEADER_BYTES) // _TOKEN_BYTES
    if not 0 < tokens < 2**16:
        raise InputError(f"blocks of {block_bytes} bytes cannot be made; give 192 bytes to 8 MB")
    spec = MemorySpec((0,), kv_heads=1, tokens=tokens, head_dim=_HEAD_DIM, reference_tokens=tokens, dtype="float16")
    codec, none = RawCodec(spec), "0" * 32
    manifest = Manifest(
        model=none,
        model_name="none",
        tokenizer=none,
        sink="",
        spec=spec,
        codec_kind="raw",
        codec_options=dict(codec.options),
        codec=codec.fingerprint,
        embedder=none,
        embedder_name="none",
        dim=_DIM,
    )
    where = config.bank.parent
    with tempfile.TemporaryDirectory(prefix=".m3-bench-", dir=where if where.is_dir() else None) as folder:
        own = config.model_copy(update={"bank": Path(folder) / "bank"})
        with closing(Bank.create(own.bank, assembly.open_home(own), manifest, codec)) as bank:
            for start in range(0, count, _GROUP):
                bank.home.commit(_batch(bank, start, min(_GROUP, count - start)))
                progress("Making blocks", start, count)
        yield own


def _batch(bank: Bank, start: int, count: int) -> Batch:
    spec, ids = bank.manifest.spec, as_ids(range(start, start + count))
    drawing = torch.Generator().manual_seed(start)
    shape = (count, len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim)
    keys, values = (torch.randn(shape, generator=drawing).to(torch.float16) for _ in range(2))
    memories = MemoryTensors(keys, values, torch.full((count,), spec.tokens))
    references = [
        Reference(f"Memory {id} that nobody wrote.", 4, places=(Place("made", 0, 29),)) for id in ids.tolist()
    ]
    vectors = np.random.default_rng(start).standard_normal((count, _DIM), np.float32)
    return Batch(ids, bank.blocks(ids, memories), references, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
