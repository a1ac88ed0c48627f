"""`import_records`: records of other banks and programs become references of a bank."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock

import numpy as np

from m3runtime.adapters.base import Adapter
from m3runtime.bank.exchange.record import Record
from m3runtime.config.schema import Config
from m3runtime.documents import expiry
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.writing.encoders.pool import EncoderPool
from m3runtime.writing.writer import OnProgress, Writer, WriteReport

_LENGTH_TOLERANCE = 0.01
"""Embeddings have length 1; banks store them in float32 or float16."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of `import_records`."""

    written: WriteReport
    taken: int
    """Embeddings of new references that the records had from the same embedder. Others were computed."""


def import_records(
    config: Config,
    adapter: Adapter,
    embedder: Embedder,
    records: Iterable[Record],
    *,
    catalogue: bool = False,
    pool: EncoderPool | None = None,
    progress: OnProgress | None = None,
    today: Callable[[], str] = expiry.today,
) -> ImportReport:
    """Add the references of these records to the bank; makes the bank if there is none.

    A reference that the bank has already gets the places of the record in addition to its own. Nothing is forgotten.
    Places that have expired are left out, and records that have no other.
    The model encodes what is new, or with ``catalogue`` does not read it. All records are read, in bounded memory,
    before anything is written. Raises `InputError` for a text that is too long for this model's references, and for an
    embedding that the embedder cannot have made; and what `Writer.write` raises.
    """
    with closing(_ShelvingEmbedder(embedder)) as shelving:
        references = _references(records, adapter, shelving, today())
        writer = Writer(config, adapter, shelving, pool=pool, embeds=True)
        written = writer.write((), added=references, catalogue=catalogue, progress=progress)
        return ImportReport(written, shelving.taken)


def _references(
    records: Iterable[Record], adapter: Adapter, shelving: "_ShelvingEmbedder", today: str
) -> Iterator[Reference]:
    limit = adapter.spec.reference_tokens
    for record in records:
        one = replace(record.reference, places=record.reference.living(today))
        if not one.places:
            continue
        tokens = adapter.count_tokens(one.text)
        if tokens > limit:
            raise InputError(
                f"{one.places[0].name}: {tokens} tokens, but a reference has at most {limit}; "
                "write it with `m3 write`, which splits texts"
            )
        if record.embedding is not None and record.embedder == shelving.fingerprint:
            shelving.keep(one, record.embedding)
        yield replace(one, tokens=tokens)


class _ShelvingEmbedder(Embedder):
    """An embedder that knows the vectors of some references: they wait in a temporary file. Thread-safe."""

    def __init__(self, embedder: Embedder) -> None:
        self.taken = 0
        self._embedder = embedder
        self._lock = Lock()
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._file.execute("CREATE TABLE shelf (digest BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    @property
    def dim(self) -> int:
        return self._embedder.dim

    @property
    def fingerprint(self) -> str:
        return self._embedder.fingerprint

    def keep(self, reference: Reference, vector: Embeddings) -> None:
        """Keep a reference's vector, ``float32[dim]``. Raises `InputError` for one that is not of length 1."""
        if vector.shape != (self.dim,) or not abs(float(np.linalg.norm(vector)) - 1) < _LENGTH_TOLERANCE:
            raise InputError(
                f"{reference.places[0].name}: the embedding is no vector of length 1 in {self.dim} numbers; "
                "leave it out, and it is computed"
            )
        row = _digest(reference.headed), vector.tobytes()
        with self._lock:
            self._file.execute("INSERT OR IGNORE INTO shelf VALUES (?, ?)", row)

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        """The vectors that are known; the others are computed."""
        with self._lock:
            rows = [
                self._file.execute("SELECT vector FROM shelf WHERE digest = ?", (_digest(text),)).fetchone()
                for text in texts
            ]
        out = np.empty((len(texts), self.dim), np.float32)
        lacking = [place for place, row in enumerate(rows) if row is None]
        for place, row in enumerate(rows):
            if row is not None:
                out[place] = np.frombuffer(row[0], np.float32)
        if lacking:
            out[lacking] = self._embedder.embed_references([texts[place] for place in lacking])
        self.taken += len(texts) - len(lacking)
        return out

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return self._embedder.embed_queries(texts)

    def close(self) -> None:
        """Remove the temporary file. The embedder stays open."""
        self._file.close()


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
