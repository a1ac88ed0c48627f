"""The audit of a home's table: is every row sound, and does none stand twice?"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3backends.lance.library import reason
from m3backends.lance.reader import REFERENCE, as_reference, as_vectors
from m3backends.lance.schema import ANCHOR, HEAD, META, STATE, escaped, opened, seal_embedding, text_key
from m3backends.lance.snapshot import Snapshot
from m3backends.records import unpack_state
from m3runtime.errors import RecordError
from m3runtime.storage.home import Damage

_BATCH = 1024
_UNIT = 1e-3
"""How far the length of an embedding may be from 1."""


def audit(snapshot: Snapshot, progress: Callable[[int, int], None] | None) -> Iterator[Damage]:
    """All damage in the rows of one version; see `LanceHome.audit`. Blocks are left out."""
    try:
        snapshot.dataset.validate()
    except (OSError, ValueError, RuntimeError) as error:
        yield Damage("home", None, f"the table is damaged: {reason(error)}")
    yield from _repeated(snapshot)
    yield from _head(snapshot)
    steps = snapshot.dataset.count_rows()
    done = 0
    vectors = ["embedding"] if snapshot.dim is not None else []
    columns = [*REFERENCE, "block_id", "mark_id", "embedding_seal", *vectors]
    for batch in snapshot.dataset.scanner(columns=columns, batch_size=_BATCH).to_batches():
        yield from _rows(snapshot, batch)
        done += batch.num_rows
        if progress is not None:
            progress(min(done, steps), steps)


def _repeated(snapshot: Snapshot) -> Iterator[Damage]:
    """Ids and keys that several rows have."""
    for where, column in (("reference", "id"), ("block", "block_id"), ("home", "mark_id"), ("home", "key")):
        values = snapshot.table(f"{column} is not null", [column])[column]
        counts = pc.value_counts(values)
        for one in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
            id = one["values"] if isinstance(one["values"], int) else None
            name = "it" if id is not None else f"the record {one['values']}"
            yield Damage(where, id, f"{name} stands {one['counts']} times in the table")


def _head(snapshot: Snapshot) -> Iterator[Damage]:
    ids = snapshot.table("id is not null or block_id is not null", ["id", "block_id"])
    last = max((value for name in ("id", "block_id") if (value := pc.max(ids[name]).as_py()) is not None), default=-1)
    if snapshot.head.next_id <= last:
        yield Damage("home", None, f"the next id is {snapshot.head.next_id}, and {last} is in use")


def _rows(snapshot: Snapshot, batch: pa.RecordBatch) -> Iterator[Damage]:
    held = {name: set(batch[name].drop_null().to_pylist()) for name in ("id", "block_id", "mark_id")}
    small = batch.drop_columns(["embedding"]) if "embedding" in batch.schema.names else batch
    rows = small.to_pylist()
    yield from _embeddings(snapshot, batch)
    for row in rows:
        if row["block_id"] is not None:
            continue
        if row["id"] is not None:
            yield from ((Damage("reference", row["id"], what)) for what in _reference(snapshot.bank, row))
        else:
            yield from (Damage("home", row["mark_id"], what) for what in _record(snapshot.bank, row))
    unknown = held["mark_id"]
    if unknown:
        wanted = ",".join(map(str, sorted(unknown)))
        there = snapshot.rows(f"id in ({wanted}) or block_id in ({wanted})", ["id", "block_id"])
        unknown = unknown - {value for row in there for value in row.values()}
        yield from (Damage("home", id, "it is quarantined and has no block") for id in sorted(unknown))


def _reference(bank: str, row: Mapping[str, Any]) -> Iterator[str]:
    try:
        reference = as_reference(bank, row)
    except RecordError:
        yield "its record is damaged"
        return
    if row["key"] != text_key(reference):
        yield "its key is another text's"
    if row["sources"] != [escaped(source) for source in reference.sources]:
        yield "it is listed under other sources"


def _record(bank: str, row: Mapping[str, Any]) -> Iterator[str]:
    key = row["key"] or ""
    try:
        value = opened(bank, row, "record")
        if key.startswith(STATE):
            unpack_state(value)
        elif row["mark_id"] is None and key not in (HEAD, ANCHOR) and not key.startswith(META):
            yield f"there is a row of no known kind: {key[:40]!r}"
    except (RecordError, ValueError):
        yield f"the record {key[:80]!r} is damaged" if key else "the record of its quarantine is damaged"


def _embeddings(snapshot: Snapshot, batch: pa.RecordBatch) -> Iterable[Damage]:
    some = batch.filter(pc.is_valid(batch["id"]))
    if not some.num_rows or snapshot.dim is None:
        return
    ids, seals = some["id"].to_pylist(), some["embedding_seal"].to_pylist()
    missing = some["embedding"].is_null().to_pylist()
    vectors = as_vectors(some["embedding"].fill_null([0.0] * snapshot.dim), snapshot.dim)
    for row, id in enumerate(ids):
        length = float(np.linalg.norm(vectors[row].astype(np.float64)))
        if missing[row] or seal_embedding(id, vectors[row]) != seals[row]:
            yield Damage("embedding", id, "its record is damaged")
        elif not abs(length - 1) <= _UNIT:  # also where it is not finite
            yield Damage("embedding", id, f"its length is {length:.4g}, not 1")
