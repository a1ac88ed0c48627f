"""Forgetting, also what is damaged: its traces are looked for where they cannot be known."""

import numpy as np

from m3backends.lmdb.environment import Reading, Writing
from m3backends.lmdb.records import (
    SEAL_BYTES,
    Source,
    digest,
    pack_ids,
    pack_source,
    unpack_id,
    unpack_ids,
    unpack_reference,
    unpack_source,
)
from m3backends.lmdb.schema import Databases
from m3runtime.errors import RecordError
from m3runtime.memory.block import Ids


def forget(txn: Writing, db: Databases, ids: Ids) -> None:
    """Remove all that a home has of these ids. Of an id without a sound reference, every text and source is looked at.

    That takes about a second for each million references.
    """
    lost: dict[bytes, bool] = {}
    """Ids whose texts and sources are to be looked for, and whether there was a reference of each."""
    for key in pack_ids(np.unique(ids)):
        known = _forget_known(txn, db, key)
        there = db.references.delete(txn, key)
        if not known:
            lost[key] = there
        txn.delete(key, db=db.blocks)
        db.embeddings.delete(txn, key)
        db.quarantine.delete(txn, key)
        db.cold.delete(txn, key)
    if lost:
        _forget_lost(txn, db, lost)


def _forget_known(txn: Writing, db: Databases, key: bytes) -> bool:
    """Remove the entries of a reference by text and source; false unless it is sound and both were there."""
    try:
        reference = db.references.read(txn, key, unpack_reference)
    except RecordError:
        return False
    if reference is None:
        return False
    source = digest(reference.source)
    listed = txn.delete(source, key, db=db.members)
    _leave(txn, db, source, unpack_id(key), reference.source)
    return _forget_text(txn, db, key, digest(reference.text)) and listed


def _forget_text(txn: Writing, db: Databases, key: bytes, text: bytes) -> bool:
    try:
        if db.digests.read(txn, text, bytes) != key:
            return False
    except RecordError:
        pass  # whosever it was, nobody else has this text
    return db.digests.delete(txn, text)


def _forget_lost(txn: Writing, db: Databases, lost: dict[bytes, bool]) -> None:
    texts = [key for key, stored in txn.cursor(db.digests.handle) if stored[SEAL_BYTES:] in lost]
    for text in texts:
        db.digests.delete(txn, text)
    for source, key in [(source, key) for source, key in txn.cursor(db.members) if key in lost]:
        txn.delete(source, key, db=db.members)
        _unlist(txn, db, source, unpack_id(key), counted=lost[key])


def _leave(txn: Writing, db: Databases, source: bytes, id: int, name: str) -> None:
    """Take a reference off what its source counts. ``name``, the source's, mends a damaged record."""
    try:
        known = db.sources.read(txn, source, unpack_source)
    except RecordError:
        _store(txn, db, source, Source(name, 0, 0).with_more(members_of(txn, db, source).tolist()))
    else:
        _store(txn, db, source, known and known.without(id))


def _unlist(txn: Writing, db: Databases, source: bytes, id: int, *, counted: bool) -> None:
    """Take an id that a source listed off what it counts, if it was ``counted``, or if the others fit only then."""
    left = members_of(txn, db, source)
    try:
        known = db.sources.read(txn, source, unpack_source)
    except RecordError:
        if not len(left):
            db.sources.delete(txn, source)
        return
    without = known and known.without(id)
    if known and without and (without.fits(left) or (counted and not known.fits(left))):
        _store(txn, db, source, without)


def _store(txn: Writing, db: Databases, source: bytes, known: Source | None) -> None:
    if known is not None and known.count:
        db.sources.put(txn, source, pack_source(known))
    else:
        db.sources.delete(txn, source)


def members_of(txn: Reading | Writing, db: Databases, source: bytes) -> Ids:
    """The ids that a source lists, as far as they are ids."""
    cursor = txn.cursor(db.members)
    return unpack_ids(id for id in (cursor.iternext_dup() if cursor.set_key(source) else ()) if len(id) == 8)
